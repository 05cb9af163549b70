"""Score one model on zero-shot tasks: lm-eval's official task definitions, with only their data replaced.

The harness supplies prompts, choices and metrics; the language model that it calls is an engine of this package.
`measure` computes every metric of a task; `result` then picks the one that the study uses for the task.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice import data, models
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import DataError, SettingsError
from coppice.data import lm_eval_compat, task_definitions
from coppice.study.settings.sections.evaluate import ZeroShot

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedTokenizerBase

    from .merged_tokens import CheckedLM

logger = logging.getLogger("coppice.zero_shot")

PREFERRED = ("acc", "exact_match")  # a task's metric if the configuration names none
FEWSHOT = "coppice-fewshot"  # name of the split of few-shot examples; no definition uses it
METHOD = 2  # version of how tasks are prompted and scored; increase it to make stored scores obsolete
METRIC = "metric:"  # prefix of the columns that hold an item's metrics


def task(name: str, record: str | Path, role: str, choice: ZeroShot | None = None, seed: int = 0) -> ConfigurableTask:
    """Return the lm-eval task `name` over the rows of one role of a prepared dataset.

    Args:
        name: name of the task.
        record: path of the dataset's dataset.json.
        role: role of the rows to score.
        choice: the section `evaluate.zero_shot`; by default its defaults.
        seed: seed with which examples for prompts are drawn from the train role.

    Raises:
        DataError: the rows do not fit the task's definition, or there are none.
    """
    from lm_eval.api.task import ConfigurableTask

    choice = choice or ZeroShot()
    config = copy.deepcopy(task_definitions.definition(name, choice.include_path))  # the harness changes it
    rows = data.load(record, role)
    shots = shots_of(name, config, choice)
    scored = _scored_split(config)
    splits = dict.fromkeys(filter(None, scored.values()), rows)
    examples = dict(config.get("fewshot_config") or {})
    drawn = {"training_split": None, "fewshot_split": None}
    if not shots:
        examples = {"samples": []}  # otherwise the harness reads all rows to draw none of them
    elif not examples.get("samples"):
        own = "fewshot_split" if examples.pop("split", None) or config.get("fewshot_split") else "training_split"
        drawn_per_item = shots + (own == "training_split" and not scored["test_split"])
        splits[FEWSHOT] = _examples(name, record, rows, drawn_per_item)
        drawn[own] = FEWSHOT
    replaced = {"custom_dataset": lambda **_: splits, "dataset_path": "", "dataset_kwargs": None}
    changed = replaced | scored | drawn | {"num_fewshot": shots, "fewshot_config": examples}
    try:
        built = ConfigurableTask(config=config | changed)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, IndexError) and not _left(config, rows):
            raise DataError(f"dataset {name}: the task has no items for {role}. Name a split with items.") from error
        raise DataError(
            f"dataset {name}: its rows do not fit the task's definition ({error!r}). Map the columns with "
            f"datasets.{name}.columns or correct the rows."
        ) from error
    built.set_fewshot_seed(seed)
    return built


def shots_of(name: str, config: Record, choice: ZeroShot) -> int:
    """Return the number of examples in a prompt: the configured one, or else the definition's.

    As in lm-eval, a definition's explicit 0 always wins.
    """
    defined, configured = config.get("num_fewshot"), choice.num_fewshot
    if configured and defined == 0:
        logger.warning("task %s: its definition sets num_fewshot to 0, so the configured number is ignored", name)
        return 0
    return (defined if configured is None else configured) or 0


def _scored_split(config: Record) -> dict[str, str | None]:
    """Return the two keys of a definition that name the split to score, exactly one of them with a name.

    The key must be the definition's own. If a definition has no test split and names no split for examples, the harness
    draws one example more than it shows, in case it draws the item itself, so all later draws depend on the key.
    """
    if not config.get("test_split") and config.get("validation_split"):
        return {"test_split": None, "validation_split": config["validation_split"]}
    return {"test_split": config.get("test_split") or "rows", "validation_split": None}


def _examples(name: str, record: PathLike, rows: Dataset, needed: int) -> Dataset:
    """Return the train rows that may serve as examples, at least `needed`, without those that the task asks itself."""
    train = data.load(record, "train")
    asked = {data.row_text(row) for row in rows}
    kept = [index for index, row in enumerate(train) if data.row_text(row) not in asked]
    if len(kept) < needed:
        raise DataError(
            f"dataset {name}: {len(kept)} of {len(train)} train rows are not scored too, but "
            f"evaluate.zero_shot.num_fewshot needs {needed}. Reduce it or name another train split."
        )
    if len(kept) < len(train):
        logger.info(
            "task %s: %d train rows are also scored and serve as no example; lm-eval's own prompts can differ",
            name,
            len(train) - len(kept),
        )
    return train.select(kept)


def _left(config: Record, rows: Dataset) -> int:
    """Return the number of rows that are left by the definition's own filter."""
    process = config.get("process_docs")
    return len(process(rows) if process else rows)


def measure(
    lm: CheckedLM, name: str, record: str | Path, role: str, choice: ZeroShot | None = None, seed: int = 0
) -> tuple[Record, list[Record]]:
    """Score one task under all of its metrics.

    Args:
        lm: the language model, an `lm_eval.api.model.LM`.
        name: name of the task.
        record: path of the dataset's dataset.json.
        role: role of the rows to score.
        choice: the section `evaluate.zero_shot`; by default its defaults.
        seed: seed of the examples in prompts.

    Returns:
        The facts {scores (metric and metric_stderr -> value), accuracies (see `_is_accuracy`), n, version, output_type,
        num_fewshot, chat_template, merged_items, warnings}, and a list with one dict per item.

    Raises:
        DataError: the task has no items, or an item does not fit its definition.
        CheckpointError: a log-likelihood is NaN.
    """
    from . import merged_tokens  # imports torch, which a finished evaluation does not need

    choice = choice or ZeroShot()
    lm_eval_compat.compile_templates_once()
    built = task(name, record, role, choice, seed)
    if not len(built.eval_docs):
        raise DataError(f"dataset {name}: the task has no items for {role}. Name a split with items.")
    _check_answers(name, built, choice.limit)
    chat = choice.chat_template and has_chat_template(lm.tokenizer, name)
    asked = min(len(built.eval_docs), choice.limit or len(built.eval_docs))
    lm.on_merged_tokens, lm.merged = choice.on_merged_tokens, set()
    try:
        output, dropped = _evaluated(lm, {name: built}, chat, limit=choice.limit), 0
    except merged_tokens.Unscorable as error:
        build = functools.partial(task, name, record, role, choice, seed)
        output, dropped = _without(error.items, lm, build, asked, chat)
    merged = dropped + len(lm.merged)
    # A definition may list several filters of the model's answers. Each gives its own scores; use the first filter's.
    first = output["samples"][name][0]["filter"]
    examples = [example for example in output["samples"][name] if example["filter"] == first]
    rows = [_row(built, example) for example in examples]
    if any(math.isnan(score) for row in rows for score in row["loglikelihoods"]):
        raise models.broken(lm.model, f"the log-likelihood of an answer of task {name} is NaN")
    scores = _scores(output["results"][name], first)
    facts = {
        "scores": scores,
        "accuracies": [metric for metric in scores if _is_accuracy(built, metric, rows)],
        "n": len(rows),
        "version": (built.config.metadata or {}).get("version"),
        "output_type": built.OUTPUT_TYPE,
        "num_fewshot": built.config.num_fewshot,
        "chat_template": chat,
        "merged_items": merged,
        "warnings": [merged_tokens.warning_of(choice.on_merged_tokens, name, merged, asked)] if merged else [],
    }
    for warning in facts["warnings"]:
        logger.warning("%s", warning)
    return facts, rows


def _evaluated(lm: CheckedLM, tasks: Record, chat: bool, **items: object) -> Record:
    """Return lm-eval's output for `tasks`; `items` are lm-eval's options that choose the items."""
    from lm_eval.evaluator import evaluate

    how = {"bootstrap_iters": 1000, "log_samples": True, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
    return evaluate(lm, {"tasks": tasks}, **how, **items)


def _without(
    rejected: set[int], lm: CheckedLM, build: functools.partial[ConfigurableTask], asked: int, chat: bool
) -> tuple[Record, int]:
    """Return lm-eval's output without items that `lm` rejects as unscorable, and how many these are.

    Args:
        rejected: places of the items that it has rejected already.
        lm: the language model.
        build: builds the task, which the harness changes.
        asked: number of items to score if none is rejected.
        chat: whether prompts use the chat template.

    Raises:
        DataError: no item is left.
    """
    from . import merged_tokens

    kept, name = list(range(asked)), build.args[0]
    # Without an item, the harness draws other examples for those after it, and other tokens may merge: try again.
    while rejected:
        kept = [item for place, item in enumerate(kept) if place not in rejected]
        if not kept:
            raise DataError(
                f"task {name}: evaluate.zero_shot.on_merged_tokens: drop leaves no item, because the tokenizer merges "
                "the end of every prompt with its answer. Set it to score-whole, or let the answers begin with a space "
                "(target_delimiter in the task's definition)."
            )
        try:
            output, rejected = _evaluated(lm, {name: build()}, chat, samples={name: kept}), set()
        except merged_tokens.Unscorable as error:
            rejected = error.items
    return output, asked - len(kept)


def _check_answers(name: str, built: ConfigurableTask, limit: int | None) -> None:
    """Raise DataError if an item's right answer is not one of its choices.

    The harness would count the item as answered wrongly. Tasks that judge answers with their own code are not checked.
    """
    if built.OUTPUT_TYPE != "multiple_choice" or built.config.process_results:
        return
    for place, doc in enumerate(itertools.islice(built.eval_docs, limit)):
        try:
            choices = built.doc_to_choice(doc)
            gold = _gold(built, choices, doc, built.doc_to_target(doc))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"dataset {name}: item {place} (from 0) does not fit the task's definition ({error!r}). Correct the "
                "row or map the columns."
            ) from error
        right = gold if isinstance(gold, list) else [gold]
        if not right or not all(isinstance(one, int) and 0 <= one < len(choices) for one in right):
            raise DataError(
                f"dataset {name}: item {place} (from 0): the answer {gold!r} is not one of the {len(choices)} choices. "
                "Public test splits are unlabeled: name another split or correct the answers."
            )


def has_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Return True if the tokenizer has a chat template; log a warning if not."""
    if getattr(tokenizer, "chat_template", None):
        return True
    logger.warning("task %s: the tokenizer has no chat template, so prompts are plain text", name)
    return False


def _scores(results: Record, chosen: str) -> dict[str, float]:
    """Return the numbers of one filter as metric -> value and <metric>_stderr -> standard error, without "N/A"."""
    found = {}
    for key, value in results.items():
        label, _, filtered = key.partition(",")  # lm-eval's keys are `<metric>,<filter>`
        if filtered == chosen and isinstance(value, int | float):
            found[label] = float(value)
    return found


def _is_accuracy(built: ConfigurableTask, metric: str, rows: Sequence[Record]) -> bool:
    """Return True if `metric` is a mean over items of values from 0 to 1 that should be high.

    Only such metrics can be paired item by item and averaged over tasks.
    """
    from lm_eval.api.metrics import mean

    if built.aggregation().get(metric) is not mean or not built.higher_is_better().get(metric):
        return False
    return all(row.get(METRIC + metric) is not None and 0 <= row[METRIC + metric] <= 1 for row in rows)


def _row(built: ConfigurableTask, example: Record) -> Record:
    """Return what is stored of an item: the target, the model's answer and every metric that is a number."""
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


def _gold(built: ConfigurableTask, choices: Sequence[str], doc: Record, target: object) -> object:
    """Return the index of an item's right choice. `target` is that index or the text of the choice itself.

    If the choices differ in the context rather than the continuation (WinoGrande), lm-eval's definitions give the index
    as the "text" instead.
    """
    target = built.doc_to_text(doc) if built.multiple_input else target
    return choices.index(target) if isinstance(target, str) and target in choices else target


def result(
    name: str, facts: Record, rows: Sequence[Record], metric: str | None = None
) -> tuple[Record, list[Record], bool]:
    """Return a task's result under one metric, its samples, and whether the metric is an accuracy.

    Args:
        name: name of the task.
        facts: the first result of `measure`.
        rows: its second result.
        metric: name of the metric; by default acc, else exact_match, else the task's first one.

    Returns:
        ({metric, value, stderr, n, version, num_fewshot, chat_template, and every metric with its standard error},
        samples, True if the metric is an accuracy).

    Raises:
        SettingsError: the task has no such metric.
    """
    scores = facts["scores"]
    metrics = [label for label in scores if not label.endswith("_stderr")]
    metric = metric or next((label for label in (*PREFERRED, *metrics) if label in scores), None)
    if metric not in metrics:
        raise SettingsError(
            f"evaluate.zero_shot.metric.{name}: the task has no metric '{metric}'. Set it to one of "
            f"{', '.join(metrics)}."
        )
    found = {"metric": metric, "value": scores[metric], "stderr": scores.get(f"{metric}_stderr")}
    found |= {key: facts[key] for key in ("n", "version", "num_fewshot", "chat_template", "merged_items")} | scores
    samples = [_sample(row, metric, facts["output_type"]) for row in rows]
    return found, samples, metric in facts["accuracies"]


def _sample(row: Record, metric: str, output_type: str) -> Record:
    """Return a row of `samples/{task}.parquet`: the item, the model's pick and the log-likelihood of each choice."""
    prediction = row["answer"]
    if output_type == "multiple_choice":
        # lm-eval's acc_norm divides log-likelihoods by the characters of each choice, and acc_bytes by its bytes.
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
