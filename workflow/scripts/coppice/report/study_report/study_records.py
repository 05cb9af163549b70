"""The records of a study as one plain structure: what is there, what is absent, what is damaged.

Needs the standard library alone, so that `coppice show` answers at once.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from coppice.core import records
from coppice.study import layout

from .job_status import Statuses

STAGES = ("dense", "pruned", "finetuned")
# As names mark such a model, at their end or before a version
INSTRUCT = re.compile(r"[-_](instruct|chat|it)(?![^-_])")


@dataclass(frozen=True)
class Metric:
    """A quantity of the report. `scale` brings a record's value to `unit`; `digits` are shown after the point."""

    key: str
    label: str
    unit: str
    scale: float
    digits: int
    higher_is_better: bool

    @property
    def is_accuracy(self):
        return self.key == "average_acc"


ACCURACY = Metric("average_acc", "mean zero-shot accuracy", "%", 100, 1, True)


def perplexity_metric(name):
    """The metric of perplexity on the text `name`."""
    return Metric(f"ppl.{name}", f"perplexity on {name}", "", 1, 2, False)


@dataclass
class Pair:
    """One model and config: its records (None where absent), and the folders of its three evaluations."""

    model: str
    config: str
    folders: dict
    selection: dict | None = None
    dense: dict | None = None
    pruned: dict | None = None
    finetuned: dict | None = None
    training: dict | None = None
    history: list | None = None
    comparison: dict | None = None
    state: str = "waiting"
    detail: str = ""

    def values(self, metric):
        """{dense, pruned, finetuned}: the metric's value at each stage, None where it was not measured."""
        known = self.measured(metric)
        found = {}
        for stage in STAGES:
            value = known.get(stage) if known else None
            found[stage] = _value(getattr(self, stage), metric) if value is None else value
        return found

    def measured(self, metric):
        """The metric's part of the comparison (values, change, recovered, verdict), or None."""
        if not self.comparison:
            return None
        if metric.is_accuracy:
            return self.comparison.get("average_acc")
        return (self.comparison.get("perplexity") or {}).get(metric.key.removeprefix("ppl."))

    @property
    def candidate(self):
        for record in (self.comparison, self.selection):
            if record and record.get("candidate"):
                return record["candidate"]
        return None

    @property
    def tasks(self):
        return (self.comparison or {}).get("zero_shot") or {}


@dataclass
class Study:
    """All of a study. `models`: name -> {variant, family, base}; `absent`: [(what, path)]; `failed`: [(what, why)]."""

    results: Path
    models: dict
    pairs: list
    statuses: Statuses
    absent: list = field(default_factory=list)
    failed: list = field(default_factory=list)

    @property
    def configs(self):
        return list(dict.fromkeys(pair.config for pair in self.pairs))

    @property
    def metrics(self):
        """The metrics that any record holds: mean accuracy first, then each text's perplexity."""
        evaluations = [record for pair in self.pairs for stage in STAGES if (record := getattr(pair, stage))]
        texts = dict.fromkeys(name for record in evaluations for name in record.get("perplexity") or {})
        accuracy = [ACCURACY] if any(record.get("average_acc") is not None for record in evaluations) else []
        return accuracy + [perplexity_metric(name) for name in texts]

    @property
    def compared(self):
        return [pair for pair in self.pairs if pair.comparison]

    @property
    def task_names(self):
        return list(dict.fromkeys(name for pair in self.pairs for name in pair.tasks))

    def pairs_of(self, model):
        return [pair for pair in self.pairs if pair.model == model]

    def pair(self, model, config):
        return next((pair for pair in self.pairs if (pair.model, pair.config) == (model, config)), None)


def _value(evaluation, metric):
    if not evaluation:
        return None
    if metric.is_accuracy:
        return evaluation.get("average_acc")
    return ((evaluation.get("perplexity") or {}).get(metric.key.removeprefix("ppl.")) or {}).get("value")


def read(results, pairs, models=None):
    """The Study under the folder `results`, of the given (model, config) `pairs`; raises nothing for what is absent."""
    results = Path(results)
    names = dict.fromkeys(model for model, _ in pairs)
    known = {name: {"variant": None, "family": None, "base": None} | (models or {}).get(name, {}) for name in names}
    study = Study(results, known, [], Statuses(results))
    pattern = layout.record(results, "dense")
    dense = {name: _take(study, f"{name}: dense evaluation", Path(pattern.format(model=name))) for name in names}
    for model, config in pairs:
        study.pairs.append(_read_pair(study, model, config, dense[model]))
    return study


def _read_pair(study, model, config, dense):
    who, paths = f"{model} / {config}", layout.of_pair(study.results, model, config)
    pair = Pair(model, config, {stage: paths[stage].parent for stage in STAGES}, dense=dense)
    failures = len(study.failed)
    for name, what in (
        ("selection", "selection"),
        ("training", "fine-tuning"),
        ("pruned", "pruned evaluation"),
        ("finetuned", "fine-tuned evaluation"),
        ("comparison", "comparison"),
    ):
        setattr(pair, name, _take(study, f"{who}: {what}", paths[name]))
    if pair.training:
        state = _take(study, f"{who}: course of the training", paths["training"].with_name("training_state.json"))
        pair.history = state and state.get("history")
    pair.state, pair.detail = study.statuses.of_pair(model, config, done=pair.comparison is not None)
    if len(study.failed) > failures:
        pair.state, pair.detail = "failed", study.failed[-1][1]
    elif pair.state == "failed":
        study.failed.append((who, pair.detail))
    return pair


def _take(study, what, path):
    """The record at `path`, or None, and then what is wrong with it is noted."""
    if not path.is_file():
        study.absent.append((what, str(path)))
        return None
    try:
        return records.read(path)
    except records.RecordError as error:
        study.failed.append((what, str(error)))
    except ValueError as error:  # a number that is not finite, which no checksum can be made of
        study.failed.append((what, f"{path}: {error}"))
    return None


def discover(results):
    """The (model, config) pairs of which any record lies under `results`, and what their names say of the models.

    Returns (pairs, models): variant and family are read off the names (`X-Instruct` is the instruct partner of `X`),
    which is all that there is without the configuration.
    """
    results = Path(results)
    pairs = {}
    kinds = ("selection", "pruned", "training", "finetuned")
    named = [(layout.root(kind), layout.RECORDS[kind][1]) for kind in kinds]
    for folder, name in (*named, (layout.root("finetuned"), layout.COMPARISON)):
        for path in sorted((results / folder).rglob(name)):
            *model, config = path.parent.relative_to(results / folder).parts
            if model and not config.startswith(("seed-", ".", "checkpoint-")):
                pairs[("/".join(model), config.removesuffix(layout.TUNED))] = None
    names = dict.fromkeys(model for model, _ in pairs)
    dense = results / layout.root("dense")
    for path in sorted(dense.rglob(layout.EVALUATION)):
        names.setdefault(str(path.parent.relative_to(dense)))
    configs = sorted({config for _, config in pairs})
    order = sorted(names, key=lambda name: (family_of(name), name))
    found = [(model, config) for model in order for config in configs]
    return found, {name: _guess(name) for name in order}


def family_of(name):
    """The family that a model's name says: lower case, without the part that marks an instruct model."""
    return INSTRUCT.sub("", name.lower())


def _guess(name):
    variant = "base" if family_of(name) == name.lower() else "instruct"
    return {"variant": variant, "family": family_of(name), "base": None}
