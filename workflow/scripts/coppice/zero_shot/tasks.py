"""Zero-shot tasks: lm-eval's official task definitions with only their data replaced, scored for one model.

The harness supplies prompts, choices and metrics; the language model that it calls is an engine of this package.
"""

import importlib.util
import logging
from functools import cache
from pathlib import Path

from .. import data
from ..errors import DataError, SettingsError, nearest

logger = logging.getLogger("coppice.zero_shot")

# Where the definitions of the seven default tasks lie in lm-eval; the index of all tasks takes 8 s to build.
OFFICIAL = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


@cache
def definition(name):
    """The official lm-eval configuration (a dict) of the task `name`; SettingsError where there is none."""
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    if name in OFFICIAL:
        return load_yaml(root / OFFICIAL[name], resolve_func=True, recursive=True)
    from lm_eval.tasks._index import Kind, TaskIndex

    index = TaskIndex.build([root])
    entry = index.get(name)
    if entry is None or entry.kind is not Kind.TASK:
        raise SettingsError(f"evaluate.zero_shot.tasks: lm-eval has no task '{name}'{nearest(name, index)}")
    return load_yaml(entry.yaml_path, resolve_func=True, recursive=True)


def official_source(name):
    """The hub data set and splits of a task, in the form of a `datasets` entry of the configuration."""
    config = definition(name)
    report = config.get("test_split") or config.get("validation_split")
    selection = config.get("validation_split") if config.get("test_split") else None
    splits = {"train": config.get("training_split"), "selection": selection, "report": report}
    return {"path": config["dataset_path"], "name": config.get("dataset_name"), "splits": splits}


def task(name, record, role):
    """The lm-eval task `name` over the rows of one role of the prepared dataset `record`."""
    from lm_eval.api.task import ConfigurableTask

    config = dict(definition(name))
    split = config.get("test_split") or config.get("validation_split")
    rows = data.load(record, role)
    replaced = {"custom_dataset": lambda **_: {split: rows}, "dataset_path": "", "dataset_kwargs": None}
    unused = {"training_split": None, "fewshot_split": None}
    if split != config.get("validation_split"):
        unused["validation_split"] = None
    try:
        return ConfigurableTask(config=config | replaced | unused)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"dataset {name}: its rows do not fit the task's definition: {error!r}") from error


def measure(lm, name, record, role, metric="acc", limit=None):
    """Score one task; returns its result and its samples, one dict an item.

    The result: {metric, value, stderr, n, version, and acc / acc_norm with their standard errors where the task has
    them}. Raises DataError where the task yields no item or lacks `metric`.
    """
    from lm_eval.evaluator import evaluate

    built = task(name, record, role)
    if not len(built.eval_docs):
        raise DataError(f"dataset {name}: the task has no items for {role}")
    output = evaluate(lm, {"tasks": {name: built}}, limit=limit, bootstrap_iters=1000, log_samples=True)
    scores = {}
    for key, value in output["results"][name].items():
        label, _, filtered = key.partition(",")
        if filtered and isinstance(value, int | float):
            scores.setdefault(label, float(value))
    if metric not in scores:
        known = ", ".join(label for label in scores if not label.endswith("_stderr"))
        raise SettingsError(f"evaluate.zero_shot.metric.{name}: the task has no metric '{metric}' (it has {known})")
    samples = [_sample(built, example, metric) for example in output["samples"][name]]
    result = {
        "metric": metric,
        "value": scores[metric],
        "stderr": scores.get(f"{metric}_stderr"),
        "n": len(samples),
        "version": (built.config.metadata or {}).get("version"),
    }
    return result | scores, samples


def _sample(built, example, metric):
    """One row of `samples/{task}.parquet`: the item, what the model picked and the log-likelihood of each choice."""
    row = {"doc_id": example["doc_id"], "doc_hash": example["doc_hash"], "correct": float(example[metric])}
    if built.OUTPUT_TYPE != "multiple_choice":
        return row | {"prediction": str(example["filtered_resps"][0]), "target": str(example["target"])}
    scores = [float(response[0]) for response in example["filtered_resps"]]
    choices = built.doc_to_choice(example["doc"])
    # lm-eval's acc_norm divides by the number of characters of each choice
    weights = [len(choice) for choice in choices] if metric == "acc_norm" else [1] * len(scores)
    picks = [score / weight for score, weight in zip(scores, weights, strict=True)]
    prediction = max(range(len(picks)), key=picks.__getitem__)
    return row | {"prediction": str(prediction), "target": str(_gold(built, example)), "loglikelihoods": scores}


def _gold(built, example):
    """Index of the right choice: definitions give it as an index, as digits or as the choice itself."""
    target = example["target"]
    choices = built.doc_to_choice(example["doc"])
    if isinstance(target, str) and target in choices:
        return choices.index(target)
    return target
