"""Rank candidates: collect their metrics, apply the bounds of a criterion and sort what is left.

A criterion is {metric, mode, where} or {pareto: knee, metrics, where}, as `settings` resolves it. A metric is
`average_acc`, `ppl.<dataset>`, a task, or a column of the user's table.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

from coppice.core.aliases import Record
from coppice.core.errors import CoppiceError
from coppice.stats import metrics as known
from coppice.stats import pareto
from coppice.study.settings.criteria import PARAMETERS, needed_metrics

Entry = dict[str, Any]  # a candidate's records, folders and numbers, as `choice.read_candidates` returns them


def metrics_of(evaluation: Record | None = None, given: Record | None = None) -> dict[str, float]:
    """Return a candidate's metrics by name, from its evaluation record and, with priority, its columns in the table.

    The column `acc` gives average_acc. The column `ppl` is used for every perplexity (see `value_of`).

    Args:
        evaluation: the record as a dict, or None.
        given: column -> value, or None.
    """
    found = known.found_in(evaluation or {})
    found.sort(key=lambda metric: not metric.reported)  # what reports show first comes first in candidates.tsv too
    metrics = {metric.key: metric.value(evaluation) for metric in found}
    if evaluation:
        metrics |= {name: result["value"] for name, result in evaluation.get("other_tasks", {}).items()}
    metrics |= {known.named(name).key: value for name, value in (given or {}).items()}
    return {name: value for name, value in metrics.items() if value is not None}


def needs_scoring(candidate: Record, criteria: Mapping[str, Record]) -> bool:
    """Return True if a candidate (grid point or table row) lacks a metric that one of the `criteria` asks for."""
    if "path" not in candidate:  # a grid point, which comes without any metrics
        return True
    given = metrics_of(given=candidate["given"])
    needed = (metric for criterion in criteria.values() for metric in needed_metrics(criterion))
    return any(value_of(given, metric) is None for metric in needed)


def value_of(metrics: dict[str, float], metric: str) -> float | None:
    """Return the value of `metric` or None. A table's column `ppl` is used for every perplexity."""
    wanted = known.named(metric)
    return metrics.get(wanted.alias if wanted.alias in metrics else wanted.key)


def is_given(given: Record | None, metric: str) -> bool:
    """Return True if a candidate's value of `metric` comes from its columns in the user's table."""
    return value_of(metrics_of(given=given), metric) is not None


def within_bounds(scored: Mapping[str, Entry], where: Mapping[str, Record]) -> tuple[list[str], dict[str, str]]:
    """Apply the bounds of a criterion.

    Args:
        scored: name -> {metrics, parameters}.
        where: quantity -> {min, max}, either of them None if there is no such bound.

    Returns:
        (names of the candidates within all bounds, name -> reason for the others).

    Raises:
        CoppiceError: no candidate is left, or one lacks a bounded quantity.
    """
    outside = {}
    for name, entry in scored.items():
        for quantity, bounds in where.items():
            value = entry["parameters"] if quantity == PARAMETERS else value_of(entry["metrics"], quantity)
            if value is None:
                raise CoppiceError(
                    f"candidate {name}: it has no value of {quantity}, but select.configs has a bound on it. Remove "
                    "the bound or give the value in candidates.table."
                )
            for end, word, beyond in (("min", "least", operator.lt), ("max", "most", operator.gt)):
                if bounds[end] is not None and beyond(value, bounds[end]):
                    outside[name] = f"{quantity} {value:g}, at {word} {bounds[end]:g} is asked for"
    left = [name for name in scored if name not in outside]
    if not left:
        raise CoppiceError(
            "no candidate is within the bounds under select.configs "
            f"({'; '.join(f'{n}: {why}' for n, why in outside.items())}). Loosen the bounds or add candidates."
        )
    return left, outside


def rank(scored: Mapping[str, Entry], criterion: Record) -> list[tuple[str, float]]:
    """Return [(name, value)] from best to worst. Ties go to the candidate with fewer parameters, then to the name.

    For a knee, only candidates on the Pareto front are ranked, and the value is the distance from the line between the
    ends of the front. Raises CoppiceError if a candidate lacks a metric.
    """
    names = list(scored)
    if criterion["pareto"]:
        first, second = (
            [_directed(scored, name, metric, mode, want) for name in names]
            for (metric, mode), want in zip(criterion["metrics"].items(), ("max", "min"), strict=True)
        )
        values = dict(zip(names, pareto.knee(first, second), strict=True))
        names, sign = [name for name in names if not math.isnan(values[name])], -1
    else:
        values = {name: _usable(scored, name, criterion["metric"]) for name in names}
        sign = -1 if criterion["mode"] == "max" else 1
    order = sorted(names, key=lambda name: (sign * values[name], scored[name]["parameters"] or math.inf, name))
    return [(name, values[name]) for name in order]


def _usable(scored: Mapping[str, Entry], name: str, metric: str) -> float:
    value = value_of(scored[name]["metrics"], metric)
    if value is None or not math.isfinite(value):
        raise CoppiceError(
            f"candidate {name}: the value of the metric {metric} is {value}, which cannot be ranked. Correct it in "
            "candidates.table or choose another metric in select.configs."
        )
    return value


def _directed(scored: Mapping[str, Entry], name: str, metric: str, mode: str, want: str) -> float:
    """Return the metric with its sign changed if its `mode` is not `want`, so that better means what `want` says."""
    value = _usable(scored, name, metric)
    return value if mode == want else -value
