"""Compare models and configs by means over the same items and the covariance of those means.

Every model answers the same items, so two means are correlated, and the variance of their difference is that of the
item-by-item differences. A `Means` holds the means of any number of columns (model, config, stage) with the covariance
of these means; differences and recovered fractions of any groups follow from it.

Formulas and sources:

- stratified mean over tasks: variance of the mean of independent strata (Cochran 1977, Sampling Techniques, ch. 5);
- mean weighted by tokens: ratio estimator, linearized (Cochran 1977, ch. 6);
- ratio of two means: Fieller's interval (Fieller 1954), which is unbounded, here None, if the denominator cannot be
  distinguished from zero;
- difference of two ratios: delta method.

All intervals assume normally distributed means, because each mean is taken over thousands of items.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
from numpy.typing import ArrayLike

from coppice.core.aliases import Estimate

from .paired_stats import LEVEL

Terms = dict[Any, float]  # a linear combination: name of a column -> weight

ROUNDING = 1e-9  # differences and standard errors below this are rounding errors


@dataclass(frozen=True)
class Means:
    """Means `values` [k] of the columns `names` (hashable, in order), and their `covariance` [k, k]."""

    names: tuple[Hashable, ...]
    values: numpy.ndarray
    covariance: numpy.ndarray

    @cached_property
    def places(self) -> dict[Hashable, int]:
        """Return column name -> index."""
        return {name: place for place, name in enumerate(self.names)}

    def __contains__(self, name: Hashable) -> bool:
        """Return whether there is a column of this name."""
        return name in self.places

    def weights(self, terms: Terms) -> numpy.ndarray:
        """Return the vector [k] of a linear combination, given as name -> weight."""
        vector = numpy.zeros(len(self.names))
        for name, weight in terms.items():
            vector[self.places[name]] += weight
        return vector

    def contrast(self, terms: Terms | numpy.ndarray) -> Estimate:
        """Return {value, interval, p} of the linear combination `terms` (name -> weight, or a vector [k])."""
        vector = self.weights(terms) if isinstance(terms, dict) else terms
        return _estimate(float(vector @ self.values), self._form(vector, vector))

    def _form(self, x: numpy.ndarray, y: numpy.ndarray) -> float:
        """Return x' covariance y over the columns that x or y uses, because the covariance of others may be NaN."""
        used = numpy.flatnonzero((x != 0) | (y != 0))
        return float(x[used] @ self.covariance[numpy.ix_(used, used)] @ y[used])

    def ratio(self, numerator: Terms, denominator: Terms) -> Estimate:
        """Return {value, interval} of the ratio of two linear combinations (name -> weight), with Fieller's interval.

        Both are None if the denominator is not above zero; the interval is None if the denominator is above zero but
        cannot be distinguished from it.
        """
        up, down = self.weights(numerator), self.weights(denominator)
        a, b = float(up @ self.values), float(down @ self.values)
        vaa, vab, vbb = (self._form(x, y) for x, y in ((up, up), (up, down), (down, down)))
        z2 = _z() ** 2
        if b <= 0:
            return {"value": None, "interval": None}
        lead = b * b - z2 * vbb
        if not lead > 0:  # not `lead <= 0`, which misses the NaN of a single item
            return {"value": a / b, "interval": None}
        middle = a * b - z2 * vab
        spread = numpy.sqrt(max(middle**2 - lead * (a * a - z2 * vaa), 0.0))
        return {"value": a / b, "interval": [float((middle - spread) / lead), float((middle + spread) / lead)]}

    def ratio_difference(self, first: tuple[Terms, Terms], second: tuple[Terms, Terms]) -> Estimate | None:
        """Return {value, interval, p} of one ratio (numerator, denominator) minus another; None if one is undefined."""
        vector, value = numpy.zeros(len(self.names)), 0.0
        for sign, (numerator, denominator) in ((1, first), (-1, second)):
            ratio = self.ratio(numerator, denominator)
            if ratio["interval"] is None:
                return None
            up, down = self.weights(numerator), self.weights(denominator)
            vector += sign * (up - ratio["value"] * down) / (down @ self.values)
            value += sign * ratio["value"]
        return _estimate(value, self._form(vector, vector))


def means(names: Iterable[Hashable], samples: ArrayLike, weights: ArrayLike | None = None) -> Means:
    """Return the Means of `samples` [k, items], weighted by `weights` [items] if given."""
    samples = numpy.asarray(samples, dtype=float)
    count = samples.shape[1]
    weights = numpy.ones(count) if weights is None else numpy.asarray(weights, dtype=float)
    values = samples @ weights / weights.sum()
    if count < 2:
        return Means(tuple(names), values, numpy.full((len(values), len(values)), numpy.nan))
    residuals = (samples - values[:, None]) * weights
    covariance = residuals @ residuals.T / weights.sum() ** 2 * count / (count - 1)
    return Means(tuple(names), values, covariance)


def mean_of(strata: Sequence[Means]) -> Means:
    """Return the unweighted mean of several Means with the same names, over independent strata (tasks)."""
    count = len(strata)
    values = sum(part.values for part in strata) / count
    return Means(strata[0].names, values, sum(part.covariance for part in strata) / count**2)


def side_by_side(blocks: Sequence[Means]) -> Means:
    """Join independent Means (of different models' text windows) into one, with no covariance between them."""
    from scipy.linalg import block_diag

    names = tuple(name for block in blocks for name in block.names)
    return Means(
        names,
        numpy.concatenate([block.values for block in blocks]),
        block_diag(*(block.covariance for block in blocks)),
    )


def _z() -> float:
    from scipy.stats import norm

    return float(norm.ppf(0.5 + LEVEL / 2))


def _estimate(value: float, variance: float) -> Estimate:
    from scipy.stats import norm

    if not numpy.isfinite(variance):
        return {"value": value, "interval": None, "p": None}
    if variance < ROUNDING**2:  # every item differs by the same amount
        return {"value": value, "interval": [value, value], "p": 1.0 if abs(value) < ROUNDING else 0.0}
    error = numpy.sqrt(variance)
    half = _z() * error
    p = float(2 * norm.sf(abs(value) / error))
    return {"value": value, "interval": [float(value - half), float(value + half)], "p": p}
