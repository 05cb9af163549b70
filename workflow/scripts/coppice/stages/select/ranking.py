"""What candidates are ranked by: their metrics, the bounds that they have to keep, and the order that follows.

A criterion is {metric, mode, where} or {pareto: knee, metrics, where}, as `settings` resolves it. A metric is
`average_acc`, `ppl.<dataset>`, a task, or a column of the user's table.
"""

import math
import operator

from coppice.core.errors import CoppiceError
from coppice.stats import pareto
from coppice.study.settings.criteria import PARAMETERS, asked


def metrics_of(evaluation=None, given=None):
    """All metrics of a candidate by name: of its evaluation record (a dict), overridden by its table's columns.

    A given `acc` stands for average_acc, a given `ppl` for any perplexity that a criterion asks for.
    """
    metrics = {}
    if evaluation:
        metrics["average_acc"] = evaluation["average_acc"]
        metrics |= {f"ppl.{name}": result["value"] for name, result in evaluation["perplexity"].items()}
        scored = evaluation["zero_shot"] | evaluation.get("other_tasks", {})
        metrics |= {name: result["value"] for name, result in scored.items()}
    for name, value in (given or {}).items():
        metrics["average_acc" if name == "acc" else name] = value
    return {name: value for name, value in metrics.items() if value is not None}


def needs_scoring(candidate, criteria):
    """Whether a candidate (grid point, or row of the table) lacks a metric that one of the `criteria` asks for."""
    if "path" not in candidate:
        return True
    given = metrics_of(given=candidate["given"])
    return any(value_of(given, metric) is None for criterion in criteria.values() for metric in asked(criterion))


def value_of(metrics, metric):
    """The value of `metric` among a candidate's metrics, or None; a table's `ppl` serves for every perplexity."""
    if metric.startswith("ppl.") and "ppl" in metrics:
        return metrics["ppl"]
    return metrics.get("average_acc" if metric == "acc" else metric)


def is_given(given, metric):
    """Whether a candidate's number for `metric` is its user's own, from the columns `given` in the table."""
    return value_of(metrics_of(given=given), metric) is not None


def within_bounds(scored, where):
    """(names of candidates that keep all bounds of `where`, name -> why not for the others).

    scored: name -> {metrics, parameters}. Raises CoppiceError where none is left.
    """
    outside = {}
    for name, entry in scored.items():
        for quantity, bounds in where.items():
            value = entry["parameters"] if quantity == PARAMETERS else value_of(entry["metrics"], quantity)
            if value is None:
                raise CoppiceError(f"candidate {name}: its {quantity} is not known, and select has a bound on it")
            for end, word, beyond in (("min", "least", operator.lt), ("max", "most", operator.gt)):
                if bounds[end] is not None and beyond(value, bounds[end]):
                    outside[name] = f"{quantity} {value:g}, at {word} {bounds[end]:g} is asked for"
    left = [name for name in scored if name not in outside]
    if not left:
        raise CoppiceError(
            f"no candidate keeps the bounds of select: {'; '.join(f'{n}: {why}' for n, why in outside.items())}"
        )
    return left, outside


def rank(scored, criterion):
    """[(name, value)] of candidates from best to worst; ties go to fewer parameters, then to the name.

    For a knee, the value is the distance from the line between the front's ends, and only candidates on the front are
    ranked. Raises CoppiceError where a candidate lacks a metric.
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


def _usable(scored, name, metric):
    value = value_of(scored[name]["metrics"], metric)
    if value is None or not math.isfinite(value):
        raise CoppiceError(f"candidate {name} has no usable value for the metric {metric} ({value})")
    return value


def _directed(scored, name, metric, mode, want):
    """A metric turned so that its better end is that of `want`."""
    value = _usable(scored, name, metric)
    return value if mode == want else -value
