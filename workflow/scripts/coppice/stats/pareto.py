"""Find the Pareto front of two metrics, and its knee."""

import math
from collections.abc import Iterable, Sequence


def pareto(first: Iterable[float], second: Iterable[float]) -> list[bool]:
    """Return for each point whether it is Pareto-optimal: no different point is at least as good in both metrics.

    In `first` higher is better, in `second` lower. Identical points are on the front together; a point with NaN never
    is.
    """
    points = list(zip(first, second, strict=True))
    return [
        not any(map(math.isnan, point))
        and not any(a >= point[0] and b <= point[1] and (a, b) != point for a, b in points)
        for point in points
    ]


def knee(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return how far each point of the front lies beyond the line between the front's ends; NaN off the front.

    first (higher is better) and second (lower is better) hold all points. Both are scaled to [0, 1] over the front, so
    that the line is the diagonal and units do not matter (Das 1999, On characterizing the "knee" of the Pareto curve,
    doi:10.1007/BF01195985). Positive is the better side. The ends have distance 0, and so do all points of a front that
    has fewer than three.
    """
    best = pareto(first, second)
    front = [(a, b) for a, b, on in zip(first, second, best, strict=True) if on]
    scaled = [_scaled(axis) for axis in zip(*front, strict=True)]
    distances = iter([(a - b) / math.sqrt(2) for a, b in zip(*scaled, strict=True)])
    return [next(distances) if on else math.nan for on in best]


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
