"""Check and complete the criteria of `select.configs` against the measured metrics and the columns of the table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from coppice.core.aliases import Record
from coppice.core.errors import SettingsError, nearest
from coppice.stats import metrics

if TYPE_CHECKING:  # jobs use this module and need no Pydantic
    from .sections import Config
    from .sections.evaluate import Evaluate

PARAMETERS = "parameters"
ENDS = (("min", "at least"), ("max", "at most"))


def resolve(config: Config, rows: list[Record], columns: list[str]) -> dict[str, Record]:
    """Return {name: {metric, mode, pareto, metrics, where, words}} of the criteria; `words` describes it in one line.

    Args:
        config: the whole configuration, defaults filled in.
        rows: those of the user's table of candidates; empty if there is no table.
        columns: those of that table that may hold metrics.

    Raises:
        SettingsError: a criterion is incomplete, names an unknown metric, or the table lacks a value it needs.
    """
    here = measured(config.evaluate)
    resolved = {}
    for name, full in completed(config).items():
        for metric in needed_metrics(full):
            _check_metric(metric, _key(name), here, columns)
            _check_column(metric, rows, name, config.candidates.table, may_be_empty=metric in here)
        resolved[name] = full | {"words": _words(full)}
    return resolved


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


def measured(evaluate: Evaluate) -> list[str]:
    """Return the names of the metrics that scoring a candidate gives. evaluate: the section of that name."""
    return [metric.key for metric in metrics.asked_in(evaluate)]


def completed(config: Config) -> dict[str, Record]:
    """Return {name: criterion} with the metrics of each knee filled in. Raises SettingsError."""
    here = measured(config.evaluate)
    return {name: _completed(one.model_dump(), _key(name), here) for name, one in config.select.configs.items()}


def _key(name: str) -> str:
    return f"config key select.configs.{name}"


def _completed(criterion: Record, key: str, here: Iterable[str]) -> Record:
    """Return the criterion with the metrics of a knee filled in; reject `pareto` together with metric or mode."""
    if not criterion["pareto"]:
        for part in ("metric", "mode"):
            if not criterion[part]:
                raise SettingsError(f"{key}.{part} is missing; give both metric and mode, or pareto: knee")
        if criterion["metrics"]:
            raise SettingsError(f"{key}.metrics: needs pareto: knee; for a single metric, set metric and mode instead")
        return criterion
    for part in ("metric", "mode"):
        if criterion[part]:
            raise SettingsError(
                f"{key}.{part}: found {criterion[part]} beside pareto; remove it and name two metrics under metrics"
            )
    both = metrics.axes([*map(metrics.named, here), metrics.PERPLEXITY.on("wikitext2")])
    chosen = criterion["metrics"] or {metric.key: metric.mode for metric in both}
    if len(chosen) != 2:
        raise SettingsError(f"{key}.metrics: found {len(chosen)}; pareto: knee needs exactly two metrics")
    return criterion | {"metrics": chosen}


def _check_metric(metric: str, key: str, here: list[str], own: list[str]) -> None:
    valid = here + own
    if metric in valid:
        return
    if metric == PARAMETERS:
        raise SettingsError(
            f"{key}: '{PARAMETERS}' cannot be the metric, only a bound (where: {{{PARAMETERS}: {{max: 3.0e+9}}}}); "
            f"valid metrics are {', '.join(valid)}"
        )
    raise SettingsError(
        f"{key}: there is no metric '{metric}'; valid are {', '.join(valid)} (from evaluate.zero_shot.tasks, "
        f"evaluate.perplexity.datasets and the table's columns), and {PARAMETERS} as a bound"
        f"{nearest(metric, [*valid, PARAMETERS])}"
    )


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
