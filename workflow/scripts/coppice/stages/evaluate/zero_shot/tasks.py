"""Zero-shot tasks: lm-eval's official task definitions with only their data replaced, scored for one model.

The harness supplies prompts, choices and metrics; the language model that it calls is an engine of this package.
What is measured (`measure`) holds every metric of the task; which of them stands for it is chosen after (`result`).
"""

import copy
import functools
import itertools
import logging
import math

from coppice import data, models
from coppice.core.errors import DataError, SettingsError
from coppice.data import task_definitions

logger = logging.getLogger("coppice.zero_shot")

PREFERRED = ("acc", "exact_match")  # a task's metric where the configuration names none
FEWSHOT = "coppice-fewshot"  # split of the examples in prompts, a name that no definition uses
METRIC = "metric:"  # begins the columns that hold an item's metrics


def task(name, record, role, choice=None, seed=0):
    """The lm-eval task `name` over the rows of one role of the prepared dataset `record`.

    choice: {include_path, num_fewshot}, both optional. Examples in prompts come from the train role, drawn with `seed`.
    """
    from lm_eval.api.task import ConfigurableTask

    choice = choice or {}
    config = copy.deepcopy(task_definitions.definition(name, choice.get("include_path")))  # the harness fills it in
    split = config.get("test_split") or config.get("validation_split") or "rows"
    rows = data.load(record, role)
    shots = shots_of(name, config, choice)
    splits = {split: rows}
    unused = {"training_split": None, "validation_split": None, "fewshot_split": None, "test_split": split}
    examples = dict(config.get("fewshot_config") or {})
    if not shots:
        examples = {"samples": []}  # else the harness reads all rows to draw none of them
    elif not examples.get("samples"):
        splits[FEWSHOT] = _examples(name, record, rows)
        examples |= {"split": FEWSHOT}
    replaced = {"custom_dataset": lambda **_: splits, "dataset_path": "", "dataset_kwargs": None}
    changed = replaced | unused | {"num_fewshot": shots, "fewshot_config": examples}
    try:
        built = ConfigurableTask(config=config | changed)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, IndexError) and not _left(config, rows):
            raise DataError(f"dataset {name}: the task has no items for {role}") from error
        raise DataError(f"dataset {name}: its rows do not fit the task's definition: {error!r}") from error
    built.set_fewshot_seed(seed)
    return built


def _compile_templates_once():
    """Let lm-eval keep its compiled Jinja templates: by itself it compiles each anew for every item."""
    from lm_eval import utils

    if not hasattr(utils.env.from_string, "cache_info"):
        utils.env.from_string = functools.lru_cache(maxsize=1024)(utils.env.from_string)


def shots_of(name, config, choice):
    """How many examples stand in a prompt: as configured, else by the definition; a definition's 0 is never changed."""
    own, wanted = config.get("num_fewshot"), choice.get("num_fewshot")
    if wanted and own == 0:
        logger.warning("task %s is defined for no examples in its prompts: num_fewshot is not applied to it", name)
        return 0
    return (own if wanted is None else wanted) or 0


def _examples(name, record, rows):
    """Rows of the train role for the prompts of task `name`, without any that is asked itself."""
    train = data.load(record, "train")
    asked = {data.row_text(row) for row in rows}
    kept = [index for index, row in enumerate(train) if data.row_text(row) not in asked]
    if not kept:
        raise DataError(
            f"dataset {name}: every train row is also asked: none is left for evaluate.zero_shot.num_fewshot"
        )
    return train.select(kept)


def _left(config, rows):
    """The rows that the definition's own filter leaves."""
    process = config.get("process_docs")
    return len(process(rows) if process else rows)


def measure(lm, name, record, role, choice=None, seed=0):
    """Score one task under all of its metrics; returns its facts and one dict an item.

    choice: {limit, include_path, num_fewshot, chat_template}, all optional. The facts: {scores: metric and
    metric_stderr -> value, accuracies (metrics that are means over items of a share that should be high), n, version,
    output_type, num_fewshot, chat_template}. Raises DataError where the task yields no item, CheckpointError on NaN.
    """
    from lm_eval.evaluator import evaluate

    choice = choice or {}
    _compile_templates_once()
    built = task(name, record, role, choice, seed)
    if not len(built.eval_docs):
        raise DataError(f"dataset {name}: the task has no items for {role}")
    _check_answers(name, built, choice.get("limit"))
    chat = bool(choice.get("chat_template")) and has_chat_template(lm.tokenizer, name)
    output = evaluate(
        lm,
        {"tasks": {name: built}},
        limit=choice.get("limit"),
        bootstrap_iters=1000,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    first = output["samples"][name][0]["filter"]  # a definition may filter answers in several ways: its first counts
    examples = [example for example in output["samples"][name] if example["filter"] == first]
    rows = [_row(built, example) for example in examples]
    if any(math.isnan(score) for row in rows for score in row["loglikelihoods"]):
        raise models.broken(lm.model, f"NaN is its log-likelihood of an answer of task {name}")
    scores = _scores(output["results"][name], first)
    facts = {
        "scores": scores,
        "accuracies": [metric for metric in scores if _is_accuracy(built, metric, rows)],
        "n": len(rows),
        "version": (built.config.metadata or {}).get("version"),
        "output_type": built.OUTPUT_TYPE,
        "num_fewshot": built.config.num_fewshot,
        "chat_template": chat,
    }
    return facts, rows


def _check_answers(name, built, limit):
    """Refuse items whose right answer is none of their choices: the harness counts each as answered wrongly, but for
    tasks that judge answers by code of their own."""
    if built.OUTPUT_TYPE != "multiple_choice" or built.config.process_results:
        return
    for place, doc in enumerate(itertools.islice(built.eval_docs, limit)):
        try:
            choices = built.doc_to_choice(doc)
            gold = _gold(built, choices, doc, built.doc_to_target(doc))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"dataset {name}: item {place} (from 0) does not fit the task's definition: {error!r}"
            ) from error
        right = gold if isinstance(gold, list) else [gold]
        if not right or not all(isinstance(one, int) and 0 <= one < len(choices) for one in right):
            raise DataError(
                f"dataset {name}: item {place} (from 0): its answer is {gold!r}, which is none of its {len(choices)} "
                "choices; rows of public test splits have no answers: name another split"
            )


def has_chat_template(tokenizer, name):
    """Whether prompts can go through the tokenizer's chat template; said where not."""
    if getattr(tokenizer, "chat_template", None):
        return True
    logger.warning("task %s: the tokenizer has no chat template, so the model is asked plainly", name)
    return False


def _scores(results, chosen):
    """The numbers of one filter by metric, and their standard errors by `<metric>_stderr`; N/A is left out."""
    found = {}
    for key, value in results.items():
        label, _, filtered = key.partition(",")
        if filtered == chosen and isinstance(value, int | float):
            found[label] = float(value)
    return found


def _is_accuracy(built, metric, rows):
    """Whether `metric` is a mean of how right each item is, so that items can be paired and tasks averaged."""
    from lm_eval.api.metrics import mean

    if built.aggregation().get(metric) is not mean or not built.higher_is_better().get(metric):
        return False
    return all(row.get(METRIC + metric) is not None and 0 <= row[METRIC + metric] <= 1 for row in rows)


def _row(built, example):
    """What is kept of an item: the target, the model's answer, and every metric that is a number."""
    metrics = {METRIC + key: float(example[key]) for key in example["metrics"] if isinstance(example[key], int | float)}
    row = {key: example[key] for key in ("doc_id", "doc_hash")} | metrics
    answers = example["filtered_resps"]
    if built.OUTPUT_TYPE == "multiple_choice":
        choices = built.doc_to_choice(example["doc"])
        scores = [float(response[0]) for response in answers[: len(choices)]]
        sizes = {"characters": [len(choice) for choice in choices], "bytes": [len(c.encode()) for c in choices]}
        gold = _gold(built, choices, example["doc"], example["target"])
        return row | {"target": str(gold), "loglikelihoods": scores, "answer": ""} | sizes
    if built.OUTPUT_TYPE == "generate_until":
        scores, answer = [], str(answers[0])
    elif built.OUTPUT_TYPE == "loglikelihood":
        scores, answer = [float(answers[0][0])], str(bool(answers[0][1]))
    else:
        scores, answer = [float(answers[0])], ""
    target = "" if built.OUTPUT_TYPE == "loglikelihood_rolling" else str(example["target"])
    return row | {"target": target, "loglikelihoods": scores, "answer": answer, "characters": [], "bytes": []}


def _gold(built, choices, doc, target):
    """Index of the right choice of an item, whose definition gives it as an index or as the choice itself (`target`).

    Where the choices differ in the context (WinoGrande), the index is what the definition calls the text.
    """
    target = built.doc_to_text(doc) if built.multiple_input else target
    return choices.index(target) if isinstance(target, str) and target in choices else target


def result(name, facts, rows, metric=None):
    """The task's result under `metric`, its samples, and whether it is an accuracy, from what `measure` found.

    The result: {metric, value, stderr, n, version, num_fewshot, chat_template, and every metric with its standard
    error}. Without `metric`, acc stands for the task, else exact_match, else its first one.
    """
    scores = facts["scores"]
    known = [label for label in scores if not label.endswith("_stderr")]
    metric = metric or next((label for label in (*PREFERRED, *known) if label in scores), None)
    if metric not in known:
        raise SettingsError(
            f"evaluate.zero_shot.metric.{name}: the task has no metric '{metric}' (it has {', '.join(known)})"
        )
    found = {"metric": metric, "value": scores[metric], "stderr": scores.get(f"{metric}_stderr")}
    found |= {key: facts[key] for key in ("n", "version", "num_fewshot", "chat_template")} | scores
    samples = [_sample(row, metric, facts["output_type"]) for row in rows]
    return found, samples, metric in facts["accuracies"]


def _sample(row, metric, output_type):
    """One row of `samples/{task}.parquet`: the item, what the model picked and the log-likelihood of each choice."""
    prediction = row["answer"]
    if output_type == "multiple_choice":
        # lm-eval's acc_norm divides by the number of characters of each choice, its acc_bytes by that of bytes
        sizes = {"acc_norm": row["characters"], "acc_bytes": row["bytes"]}.get(metric)
        picks = [score / (sizes[i] if sizes is not None else 1) for i, score in enumerate(row["loglikelihoods"])]
        prediction = str(max(range(len(picks)), key=picks.__getitem__))
    return {
        "doc_id": row["doc_id"],
        "doc_hash": row["doc_hash"],
        "correct": row.get(METRIC + metric),
        "prediction": prediction,
        "target": row["target"],
        "loglikelihoods": list(row["loglikelihoods"]),
    }
