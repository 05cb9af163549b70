"""Pareto fronts of two metrics, and the knee of one."""

import math


def axes_of(columns):
    """(accuracy, perplexity): the columns of a table of candidates that a front is drawn from, None where missing."""
    accuracy = next((name for name in ("average_acc", "acc") if name in columns), None)
    texts = [name for name in columns if name.startswith("ppl.")] + (["ppl"] if "ppl" in columns else [])
    return accuracy, texts[0] if texts else None


def pareto(first, second):
    """Booleans: which points (`first` higher is better, `second` lower) no other one is as good as in both.

    Points that are alike are on the front together; one with NaN never is.
    """
    points = list(zip(first, second, strict=True))
    return [
        not any(map(math.isnan, point))
        and not any(a >= point[0] and b <= point[1] and (a, b) != point for a, b in points)
        for point in points
    ]


def knee(first, second):
    """Distance of each point of a front from the line between its ends, towards the better side; NaN off the front.

    first (higher is better), second (lower is better): of all points. Both are scaled to [0, 1] over the front, so that
    the line is the diagonal and neither unit counts (Das 1999, On characterizing the "knee" of the Pareto curve,
    doi:10.1007/BF01195985). The ends lie at 0; where the front has fewer than three points, all do.
    """
    best = pareto(first, second)
    front = [(a, b) for a, b, on in zip(first, second, best, strict=True) if on]
    scaled = [_scaled(axis) for axis in zip(*front, strict=True)]
    distances = iter([(a - b) / math.sqrt(2) for a, b in zip(*scaled, strict=True)])
    return [next(distances) if on else math.nan for on in best]


def _scaled(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
