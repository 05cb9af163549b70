"""Read the records of a study into one structure, and list those that are missing or damaged.

Imports only the standard library and light modules of this package, so that `coppice show` starts at once.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.render import formatting
from coppice.stats import metrics
from coppice.stats.metrics import Metric
from coppice.study import layout

from .job_status import Statuses

STAGES = ("dense", "pruned", "finetuned")
# How reports write a stage; records, columns and file names say "finetuned".
STAGE_LABELS = {"dense": "dense", "pruned": "pruned", "finetuned": "fine-tuned"}
NAMED = 6  # the heading of a group names at most this many models
# An instruct model's name ends in one of these words, or has it before a version ("L-7B-it-v1").
INSTRUCT = re.compile(r"[-_](instruct|chat|it)(?![^-_])")


@dataclass
class Pair:
    """One model and config: its records (None if missing), the folders of its evaluations, and its state."""

    model: str
    config: str
    folders: dict[str, Path]
    selection: Record | None = None
    dense: Record | None = None
    pruned: Record | None = None
    finetuned: Record | None = None
    training: Record | None = None
    history: list[Record] | None = None
    comparison: Record | None = None
    latency: Record | None = None
    state: str = "waiting"
    detail: str = ""

    def values(self, metric: Metric) -> dict[str, float | None]:
        """Return {dense, pruned, finetuned} -> the metric's value, None if it was not measured.

        The comparison's values come first; without a comparison they are those of the evaluations.
        """
        compared = self.measured(metric) or {}
        found = {stage: compared.get(stage) for stage in STAGES}
        return {stage: metric.value(getattr(self, stage)) if value is None else value for stage, value in found.items()}

    def measured(self, metric: Metric) -> Record | None:
        """Return the metric's part of the comparison (values, change, recovered, verdict), or None."""
        return metric.part(self.comparison)

    @property
    def candidate(self) -> str | None:
        """The name of the selected candidate, or None."""
        for record in (self.comparison, self.selection):
            if record and record.get("candidate"):
                return record["candidate"]
        return None

    @property
    def tasks(self) -> dict[str, Record]:
        """The parts of the comparison that are about tasks: task -> part."""
        return (self.comparison or {}).get("zero_shot") or {}


@dataclass
class Study:
    """All records of a study.

    Attributes:
        results: the results folder.
        models: name -> {variant, family, base}.
        pairs: list of `Pair`.
        statuses: the `Statuses` of its jobs.
        absent: [(description, path)] of missing records.
        failed: [(description, reason)] of damaged records and failed jobs.
        is_part: whether it is one of several `groups` of a study.
    """

    results: Path
    models: dict[str, Record]
    pairs: list[Pair]
    statuses: Statuses
    absent: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    is_part: bool = False

    @property
    def configs(self) -> list[str]:
        """The configs of the pairs, each once and in their order."""
        return list(dict.fromkeys(pair.config for pair in self.pairs))

    @functools.cached_property
    def metrics(self) -> list[Metric]:
        """The metrics that reports show and at least one record holds, in the order of `metrics.METRICS`."""
        entries = dict.fromkeys(entry for record in self.evaluations for entry in metrics.held_by(record))
        found = []
        for entry in entries:
            held = [metric for record in self.evaluations for metric in metrics.found_in(record, [entry])]
            if entry.mean_of:
                found += [entry.on(*self.task_names)] if held else []
            elif entry.reported:
                found += dict.fromkeys(held)
        return found

    @property
    def evaluations(self) -> list[Record]:
        """The evaluations of all pairs and stages."""
        return [record for pair in self.pairs for stage in STAGES if (record := getattr(pair, stage))]

    @property
    def axes(self) -> tuple[Metric, Metric]:
        """The metric that answers the study's questions, and another one beside it (see `metrics.axes`)."""
        return metrics.axes(self.metrics)

    @functools.cached_property
    def groups(self) -> list["Study"]:
        """The study itself, or the parts of a study that mixes models: those that have the same two axes together.

        Models without any evaluation join the only other group, or else they are the last one.
        """
        by_axes: dict[tuple[str, ...], list[str]] = {}
        for model in self.models:
            own = replace(self, pairs=self.pairs_of(model))
            by_axes.setdefault(tuple(one.key for one in own.axes) if own.metrics else (), []).append(model)
        if len(by_axes) - (() in by_axes) < 2:
            return [self]
        groups = sorted(by_axes.items(), key=lambda group: not group[0])
        return [self._part(names) for _, names in groups]

    def _part(self, names: Sequence[str]) -> "Study":
        """Return the part of the study that some of its models are. It adds to the study's missing and failed."""
        own = {name: self.models[name] for name in names}
        return replace(self, models=own, pairs=[pair for pair in self.pairs if pair.model in own], is_part=True)

    @property
    def ranked_metrics(self) -> list[Metric]:
        """The metrics with the two axes first, for tables and figures that have no room for all of them."""
        return list(dict.fromkeys([*(metric for metric in self.axes if metric in self.metrics), *self.metrics]))

    @property
    def beside(self) -> list[Metric]:
        """The metrics that the leading one is drawn against: those of the other direction, or else the others."""
        leading, other = self.axes
        rest = [metric for metric in self.metrics if metric != leading]
        return [metric for metric in rest if metric.higher_is_better == other.higher_is_better]

    @property
    def title(self) -> str:
        """The heading of a group: how its models are measured, and which they are."""
        names = formatting.listed(self.models) if len(self.models) <= NAMED else f"{len(self.models)} models"
        return f"By {self.axes[0].kind}: {names}" if self.metrics else f"Not measured yet: {names}"

    @property
    def compared(self) -> list[Pair]:
        """The pairs that have a comparison."""
        return [pair for pair in self.pairs if pair.comparison]

    @property
    def task_names(self) -> list[str]:
        """The tasks that any comparison holds, each once."""
        return list(dict.fromkeys(name for pair in self.pairs for name in pair.tasks))

    def pairs_of(self, model: str) -> list[Pair]:
        """Return the pairs of a model."""
        return [pair for pair in self.pairs if pair.model == model]

    def pair(self, model: str, config: str) -> Pair | None:
        """Return the pair of a model and config, or None."""
        return next((pair for pair in self.pairs if (pair.model, pair.config) == (model, config)), None)


def read(results: PathLike, pairs: Sequence[tuple[str, str]], models: Mapping[str, Record] | None = None) -> Study:
    """Return the `Study` of the (model, config) `pairs` under the folder `results`.

    Missing and damaged records do not raise; they are listed in `Study.absent` and `Study.failed`.
    """
    results = Path(results)
    names = dict.fromkeys(model for model, _ in pairs)
    facts = {name: {"variant": None, "family": None, "base": None} | (models or {}).get(name, {}) for name in names}
    study = Study(results, facts, [], Statuses(results))
    pattern = layout.record(results, "dense")
    dense = {name: _take(study, f"{name}: dense evaluation", Path(pattern.format(model=name))) for name in names}
    for model, config in pairs:
        study.pairs.append(_read_pair(study, model, config, dense[model]))
    for model in names:
        path = Path(layout.record(results, "latency").format(model=model))
        latency = _take(study, f"{model}: latency", path) if path.is_file() else None  # a study may measure none
        for pair in study.pairs_of(model):
            pair.latency = latency
    return study


def _read_pair(study: Study, model: str, config: str, dense: Record | None) -> Pair:
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
        state = _take(study, f"{who}: training history", paths["training"].with_name("training_state.json"))
        pair.history = state and state.get("history")
    pair.state, pair.detail = study.statuses.of_pair(model, config, pair.candidate, pair.comparison is not None)
    # A damaged record makes the pair fail, whatever state the status files report.
    if len(study.failed) > failures:
        pair.state, pair.detail = "failed", study.failed[-1][1]
    elif pair.state == "failed":
        study.failed.append((who, pair.detail))
    return pair


def _take(study: Study, what: str, path: Path) -> Record | None:
    """Return the record at `path`, or None after adding it to the study's missing or failed records."""
    if not path.is_file():
        study.absent.append((what, str(path)))
        return None
    try:
        return records.read(path)
    except records.RecordError as error:
        study.failed.append((what, str(error)))
    except ValueError as error:  # NaN and infinity are not valid in a record, so its checksum cannot be computed
        study.failed.append((what, f"{path}: {error}"))
    return None


def discover(results: PathLike) -> tuple[list[tuple[str, str]], dict[str, Record]]:
    """Find the study under `results` without its configuration.

    Returns:
        (pairs, models): every (model, config) with at least one record, and model -> {variant, family, base}. Variant
        and family are guessed from the names: `X-Instruct` is the instruct partner of `X`.
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


def family_of(name: str) -> str:
    """Return the family that a model's name suggests: lower case, without the instruct suffix."""
    return INSTRUCT.sub("", name.lower())


def _guess(name: str) -> Record:
    variant = "base" if family_of(name) == name.lower() else "instruct"
    return {"variant": variant, "family": family_of(name), "base": None}
