"""Check and complete the criteria of `select.configs` against the measured metrics and the columns of the table.

Each model has criteria of its own, because a study may mix models that are measured by different metrics.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coppice.core.aliases import Record
from coppice.core.errors import SettingsError, nearest
from coppice.stats import metrics

from . import registry

if TYPE_CHECKING:  # jobs use this module and need no Pydantic
    from .sections import Config
    from .sections.evaluate import Evaluate
    from .sections.select import Criterion, Mode

PARAMETERS = "parameters"
ENDS = (("min", "at least"), ("max", "at most"))


@dataclass(frozen=True)
class Measured:
    """What the candidates of the study's models are measured by, against which criteria are checked.

    Attributes:
        by_model: model -> the names of the metrics that scoring one of its candidates gives.
        columns: those columns of the user's table of candidates that may hold metrics.
        evaluators: those that apply to the kind of some model.
        datasets: the data sets that the configuration describes.
    """

    by_model: Mapping[str, list[str]]
    columns: list[str] = field(default_factory=list)
    evaluators: Collection[str] = ()
    datasets: Collection[str] = ()

    def everywhere(self) -> list[str]:
        """Return the names of all metrics of any model."""
        return list(dict.fromkeys(name for names in self.by_model.values() for name in names))


def resolve(config: Config, here: Measured, rows: list[Record], notices: list[str]) -> dict[str, dict[str, Record]]:
    """Return {model: {name: {metric, mode, pareto, metrics, where, words}}}; `words` describes a criterion in one line.

    A criterion whose metrics a model lacks is left out for that model, with a notice.

    Args:
        config: the whole configuration, defaults filled in.
        here: what is measured.
        rows: those of the user's table of candidates; empty if there is no table.
        notices: a list to which notices are added.

    Raises:
        SettingsError: a criterion is incomplete, names a metric that no model has, or the table lacks a value it needs.
    """
    found: dict[str, dict[str, Record]] = {model: {} for model in here.by_model}
    for name, one in config.select.configs.items():
        for model in here.by_model:
            full = _completed(one, _key(name), model, here)
            lacking = [metric for metric in needed_metrics(full) if metric not in here.by_model[model] + here.columns]
            for metric in lacking:
                _check_metric(metric, _key(name), here, is_one_of_several=isinstance(one.metric, list))
            if lacking:
                notices.append(
                    f"{_key(name)}: is left out for model '{model}', which is not measured by {' and '.join(lacking)}"
                )
                continue
            for metric in needed_metrics(full):
                own = [row for row in rows if row["model"] == model]
                measured_here = metric in here.by_model[model]
                _check_column(metric, own, name, config.candidates.table, may_be_empty=measured_here)
            found[model][name] = full | {"words": _words(full)}
    for model, own in found.items():
        if not own:
            raise SettingsError(
                f"config key select.configs: none of {', '.join(config.select.configs)} has a metric by which model "
                f"'{model}' is measured ({', '.join(here.by_model[model] + here.columns) or 'none'}); add a criterion, "
                f"or set models.{model}.evaluate"
            )
    return found


def needed_metrics(criterion: Record) -> list[str]:
    """Return the metrics that a criterion needs of each candidate. The parameter count needs no measurement."""
    metrics = list(criterion["metrics"] or [criterion["metric"]])
    return list(dict.fromkeys([*metrics, *(name for name in criterion["where"] if name != PARAMETERS)]))


def scored_texts(criteria: Iterable[Record], texts: Iterable[str]) -> list[str]:
    """Return the texts that candidates are scored on: those whose perplexity some criterion uses.

    If no criterion uses perplexity, return all, because candidates.tsv shows perplexity in any case.
    """
    wanted = {metric for criterion in criteria for metric in needed_metrics(criterion)}
    return [name for name in texts if metrics.PERPLEXITY.on(name).key in wanted] or list(texts)


def scored_data(criteria: Iterable[Record], lists: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return section of `evaluate` -> those of its data sets by which some criterion chooses.

    Args:
        criteria: resolved criteria.
        lists: section -> its data sets.
    """
    wanted = [metrics.named(metric) for criterion in criteria for metric in needed_metrics(criterion)]
    used = {(metric.setting[0], name) for metric in wanted if metric.setting for name in metric.names}
    return {section: [name for name in names if (section, name) in used] for section, names in lists.items()}


def measured(evaluate: Evaluate) -> list[str]:
    """Return the names of the metrics that scoring a candidate gives. evaluate: the section of that name."""
    return [metric.key for metric in metrics.asked_in(evaluate)]


def _key(name: str) -> str:
    return f"config key select.configs.{name}"


def _completed(one: Criterion, key: str, model: str, here: Measured) -> Record:
    """Return a criterion for a model: with one metric and its mode, or with both metrics of a knee.

    Raises SettingsError if metric and mode are missing or stand beside `pareto`.
    """
    criterion = one.model_dump()
    if not criterion["pareto"]:
        if not criterion["metric"]:
            raise SettingsError(f"{key}.metric is missing; give a metric, or pareto: knee")
        if criterion["metrics"]:
            raise SettingsError(f"{key}.metrics: needs pareto: knee; for a single metric, set metric instead")
        return criterion | _chosen(criterion["metric"], criterion["mode"], key, model, here)
    for part in ("metric", "mode"):
        if criterion[part]:
            raise SettingsError(
                f"{key}.{part}: found {criterion[part]} beside pareto; remove it and name two metrics under metrics"
            )
    both = metrics.axes(map(metrics.named, here.by_model[model]))
    # of a model that is measured by less than two metrics, the message names the perplexity on wikitext2
    both = [one.on("wikitext2") if one == metrics.PERPLEXITY else one for one in both]
    chosen = criterion["metrics"] or {metric.key: metric.mode for metric in both}
    if len(chosen) != 2:
        raise SettingsError(f"{key}.metrics: found {len(chosen)}; pareto: knee needs exactly two metrics")
    return criterion | {"metrics": chosen}


def _chosen(wanted: str | list[str], mode: Mode | None, key: str, model: str, here: Measured) -> Record:
    """Return {metric, mode}: the first of the wanted metrics that the model has, else the first one."""
    several = [wanted] if isinstance(wanted, str) else wanted
    for metric in several:
        _check_metric(metric, key, here, is_one_of_several=isinstance(wanted, list))
    directions = {metrics.named(metric).mode for metric in several}
    if mode and len(directions) > 1:
        raise SettingsError(
            f"{key}.mode: found {mode}, but {' and '.join(several)} have different directions; leave mode out"
        )
    metric = next((one for one in several if one in here.by_model[model] + here.columns), several[0])
    if mode is None and metric in here.columns and metric not in here.everywhere():
        raise SettingsError(
            f"{key}.mode is missing; the column {metric} of candidates.table has no direction of its own, so set mode "
            "to max or min"
        )
    return {"metric": metric, "mode": mode or metrics.named(metric).mode}


def _check_metric(metric: str, key: str, here: Measured, is_one_of_several: bool) -> None:
    """Reject a metric that no model of the study has, unless it can be that of a model that was dropped."""
    valid = here.everywhere() + here.columns
    if metric in valid or _is_of_other_models(metric, here, is_one_of_several):
        return
    if metric == PARAMETERS:
        raise SettingsError(
            f"{key}: '{PARAMETERS}' cannot be the metric, only a bound (where: {{{PARAMETERS}: {{max: 3.0e+9}}}}); "
            f"valid metrics are {', '.join(valid)}"
        )
    raise SettingsError(
        f"{key}: there is no metric '{metric}'; valid are {', '.join(valid)} (from the data sets under evaluate and "
        f"models.X.evaluate, and the table's columns), and {PARAMETERS} as a bound"
        f"{nearest(metric, [*valid, PARAMETERS])}"
    )


def _is_of_other_models(metric: str, here: Measured, is_one_of_several: bool) -> bool:
    """Return whether a metric exists, but for models that are not in the study.

    It then applies to no kind of model in the study, or it is an alternative on a data set that the study describes.
    """
    entry = metrics.named(metric)
    exists = entry.section != metrics.TASK.section or metric in registry.TASKS
    is_of_other_kinds = exists and entry.setting is not None and entry.setting[0] not in here.evaluators
    return is_of_other_kinds or (is_one_of_several and entry.name in here.datasets)


def _check_column(metric: str, rows: Iterable[Record], name: str, table: str | None, may_be_empty: bool) -> None:
    """Reject cells that a criterion cannot compare. may_be_empty: an empty cell is measured here instead."""
    for row in rows:
        value = row["given"].get(metric)
        if not (isinstance(value, float) or (value is None and may_be_empty)):
            raise SettingsError(
                f"{table}, row {row['row']}, column {metric}: must be a finite number, because select.configs.{name} "
                "uses it; fill in the cell"
            )


def _words(criterion: Record) -> str:
    """Describe a criterion in one line, e.g. `max average_acc, parameters at most 6e+09`. Records contain this text."""
    if criterion["pareto"]:
        words = f"knee of {' and '.join(f'{name} ({mode})' for name, mode in criterion['metrics'].items())}"
    else:
        words = f"{criterion['mode']} {criterion['metric']}"
    for name, bounds in criterion["where"].items():
        parts = [f"{word} {bounds[end]:g}" for end, word in ENDS if bounds[end] is not None]
        words += f", {name} {' and '.join(parts)}"
    return words
