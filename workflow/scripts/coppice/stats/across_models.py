"""Compare models and configs by means over the same units, and by what each unit adds to those means.

Every model answers the same items and reads the same text, so two means are correlated, and the variance of their
difference is that of the unit-by-unit differences. A `Means` holds the means of any number of columns (model, config,
stage); differences, recovered fractions and their intervals follow from it, for the comparison of one pair as for the
answers of a whole study. What is resampled is independent: an item of a task; a document of a text, or blocks of its
windows if it has no documents.

Formulas and sources:

- independent units of unequal weight: jackknife that deletes a unit at a time (Efron & Tibshirani 1993, ch. 11), with
  Student's t for Kish's effective number of units (Kish 1965) minus one;
- scores of a corpus, such as BLEU, which are functions of totals over units: the same jackknife, in which a unit adds
  to the score what the score of the other units lacks;
- ordered units that depend on their neighbors: circular block bootstrap in closed form, or cosine waves if there are
  few units, see `blocks`;
- several strata (tasks) are independent: their variances add (Cochran 1977, Sampling Techniques, ch. 5), and the
  degrees of freedom are those of Satterthwaite 1946;
- ratio of two means: Fieller's interval (Fieller 1954), which is unbounded, here None, if the denominator cannot be
  distinguished from zero;
- difference of two ratios, and perplexity as exp of a mean: delta method.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy
from numpy.typing import ArrayLike

from coppice.core.aliases import Estimate, Record

from . import blocks
from .paired_stats import LEVEL
from .stored_samples import ITEMS, WINDOWS

Terms = dict[Any, float]  # a linear combination: name of a column -> weight

ROUNDING = 1e-9  # differences and standard errors below this are rounding errors
FEW_UNITS = 20  # an interval over fewer units is not reliable


@dataclass(frozen=True)
class Stratum:
    """Units that are sampled together and independently of those of all other strata.

    Attributes:
        unit: what they are, as in `stored_samples`: items, documents or windows.
        places: the columns [c] whose means these units are part of.
        influence: [c, units], what a unit adds to the deviation of each of these means; sums to zero over the units.
        shares: [c, units], how much a unit counts in each of these means; each row sums to one.
        note: what a reader must know about the choice of units, or None.
    """

    unit: str
    places: numpy.ndarray
    influence: numpy.ndarray
    shares: numpy.ndarray
    note: str | None = None

    @property
    def count(self) -> int:
        """The number of units that count."""
        return int(numpy.count_nonzero(self.shares[0]))

    def used(self, vectors: numpy.ndarray) -> numpy.ndarray:
        """Return which of its columns linear combinations [v, k] of all columns use."""
        return numpy.flatnonzero(vectors[:, self.places].any(axis=0))

    def series(self, vectors: numpy.ndarray) -> numpy.ndarray:
        """Return what each unit adds to linear combinations [v, k] of all columns, as [v, units]."""
        used = self.used(vectors)
        return vectors[:, self.places[used]] @ self.influence[used]

    def covariance(self, vectors: numpy.ndarray) -> tuple[numpy.ndarray, float]:
        """Return the covariance [v, v] of linear combinations [v, k], and the degrees of freedom of the last one.

        The last one also decides the length of blocks.
        """
        series, units = self.series(vectors), self.shares.shape[1]
        if units < 2:
            return numpy.full((len(series), len(series)), numpy.nan), numpy.nan
        if self.unit == WINDOWS:
            return blocks.covariance(series)
        shares = self.shares[self.used(vectors)].mean(axis=0)
        without = series / (1 - shares)  # how far the combination moves if the unit is left out
        concentration = float(shares @ shares)
        return without @ without.T * (1 - concentration), 1 / concentration - 1


@dataclass(frozen=True)
class Means:
    """Means `values` [k] of the columns `names` (hashable, in order), with the `strata` that they are taken over."""

    names: tuple[Hashable, ...]
    values: numpy.ndarray
    strata: tuple[Stratum, ...]

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

    def exp(self) -> Means:
        """Return the exponentials of these means, such as perplexities of mean losses."""
        values = numpy.exp(self.values)
        strata = (replace(one, influence=one.influence * values[one.places, None]) for one in self.strata)
        return Means(self.names, values, tuple(strata))

    def _covariance(self, *vectors: numpy.ndarray) -> tuple[numpy.ndarray, float]:
        """Return the covariance [v, v] of linear combinations [k], and the degrees of freedom of the last one's."""
        rows = numpy.stack(vectors)
        total, spent = numpy.zeros((len(rows), len(rows))), 0.0
        for stratum in self.strata:
            if not rows[:, stratum.places].any():
                continue
            part, freedom = stratum.covariance(rows)
            total += part
            spent += part[-1, -1] ** 2 / freedom if part[-1, -1] else 0.0
        return total, float(total[-1, -1] ** 2 / spent) if spent else numpy.inf

    def error(self, terms: Terms | numpy.ndarray) -> tuple[float, float]:
        """Return the standard error and the degrees of freedom of a linear combination; NaN of a single unit."""
        vector = self.weights(terms) if isinstance(terms, dict) else terms
        covariance, freedom = self._covariance(vector)
        return float(numpy.sqrt(covariance[-1, -1])), freedom

    def contrast(self, terms: Terms | numpy.ndarray) -> Estimate:
        """Return {value, interval, p} of the linear combination `terms` (name -> weight, or a vector [k])."""
        vector = self.weights(terms) if isinstance(terms, dict) else terms
        return estimate(float(vector @ self.values), *self.error(vector))

    def ratio(self, numerator: Terms, denominator: Terms) -> Estimate:
        """Return {value, interval} of the ratio of two linear combinations (name -> weight), with Fieller's interval.

        Both are None if the denominator is not above zero; the interval is None if the denominator is above zero but
        cannot be distinguished from it.
        """
        up, down = self.weights(numerator), self.weights(denominator)
        a, b = float(up @ self.values), float(down @ self.values)
        if b <= 0:
            return {"value": None, "interval": None}
        covariance, freedom = self._covariance(up, down, up - a / b * down)
        z2 = quantile(freedom) ** 2
        lead = b * b - z2 * covariance[1, 1]
        if not lead > 0:  # not `lead <= 0`, which misses the NaN of a single unit
            return {"value": a / b, "interval": None}
        middle = a * b - z2 * covariance[0, 1]
        spread = numpy.sqrt(max(middle**2 - lead * (a * a - z2 * covariance[0, 0]), 0.0))
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
        return estimate(value, *self.error(vector))

    def recovered(self, dense: Hashable, pruned: Hashable, finetuned: Hashable, higher_is_better: bool) -> Estimate:
        """Return (finetuned - pruned) / (dense - pruned) of three columns as {value, interval, note}.

        The value is None if pruning lost nothing.
        """
        sign = 1 if higher_is_better else -1
        ratio = self.ratio({finetuned: sign, pruned: -sign}, {dense: sign, pruned: -sign})
        note = None
        if ratio["value"] is None:
            note = "pruning lost nothing"
        elif ratio["interval"] is None:
            single = any(stratum.count < 2 for stratum in self.strata)
            note = "a single item has no interval" if single else "what pruning lost is within noise"
        return ratio | {"note": note}

    def resampled(self, terms: Terms) -> Record:
        """Return what the interval of a linear combination resamples, as {unit, count, block, note}.

        count: of units, over all strata. block: length of the blocks that units are drawn in; None if one by one, or if
        they are too few for blocks. note: what a reader must know before relying on the interval, or None.
        """
        vector = self.weights(terms)[None]
        found = [stratum for stratum in self.strata if vector[:, stratum.places].any()]
        drawn = [blocks.blocks_of(one.series(vector)[-1]) for one in found if one.unit == WINDOWS]
        counts = [stratum.count for stratum in found]
        few = min(counts, default=0)
        unit = " and ".join(dict.fromkeys(stratum.unit for stratum in found))
        notes = [stratum.note for stratum in found if stratum.note]
        notes += [f"fewer than {FEW_UNITS} {unit} ({few}) give no reliable interval"] if few < FEW_UNITS else []
        return {
            "unit": unit,
            "count": sum(counts),
            "block": max((one.length for one in drawn if one), default=None),
            "note": "; ".join(dict.fromkeys(notes)) or None,
        }


def means(
    names: Iterable[Hashable],
    samples: ArrayLike,
    weights: ArrayLike | None = None,
    unit: str = ITEMS,
    note: str | None = None,
) -> Means:
    """Return the Means of `samples` [k, units] over one stratum.

    Args:
        names: the columns.
        samples: a value for each column and unit.
        weights: [units], or [k, units] if a unit counts differently in each column, such as the tokens that different
            tokenizers make of a document; None for equal weights.
        unit: what the units are; `WINDOWS` are in the order of the text.
        note: what a reader must know about the choice of units.

    Raises:
        ValueError: if there is no unit.
    """
    samples = numpy.asarray(samples, dtype=float)
    if not samples.size:
        raise ValueError("there is no item to compare")
    weights = numpy.ones(samples.shape[1]) if weights is None else numpy.asarray(weights, dtype=float)
    shares = numpy.broadcast_to(weights / weights.sum(axis=-1, keepdims=True), samples.shape)
    values = (samples * shares).sum(axis=1)
    influence = (samples - values[:, None]) * shares
    stratum = Stratum(unit, numpy.arange(len(values)), influence, shares, note)
    return Means(tuple(names), values, (stratum,))


def scores(names: Iterable[Hashable], statistics: ArrayLike, score: Callable[[numpy.ndarray], numpy.ndarray]) -> Means:
    """Return the Means of scores of a corpus over its rows.

    Args:
        names: the columns.
        statistics: [k, rows, s] for each column and row.
        score: maps totals [..., s] over rows to scores [...].

    Raises:
        ValueError: if there is no row.
    """
    statistics = numpy.asarray(statistics, dtype=float)
    if not statistics.size:
        raise ValueError("there is no row to compare")
    totals, rows = statistics.sum(axis=1), statistics.shape[1]
    values = score(totals)
    missing = values[:, None] - score(totals[:, None] - statistics)  # what the score of the other rows lacks
    influence = (missing - missing.mean(axis=1, keepdims=True)) * (1 - 1 / rows)
    shares = numpy.full(influence.shape, 1 / rows)
    return Means(tuple(names), values, (Stratum(ITEMS, numpy.arange(len(values)), influence, shares),))


def mean_over_repeats(repeats: Sequence[Means]) -> Means:
    """Return the mean of several Means of the same columns over the same units, such as those of several seeds."""
    strata = [
        replace(same[0], influence=numpy.mean([one.influence for one in same], axis=0))
        for same in zip(*(one.strata for one in repeats), strict=True)
    ]
    return Means(repeats[0].names, numpy.mean([one.values for one in repeats], axis=0), tuple(strata))


def mean_of(strata: Sequence[Means]) -> Means:
    """Return the unweighted mean of several Means with the same names, over independent strata (tasks)."""
    count = len(strata)
    parts = (replace(one, influence=one.influence / count) for part in strata for one in part.strata)
    return Means(strata[0].names, sum(part.values for part in strata) / count, tuple(parts))


def side_by_side(groups: Sequence[Means]) -> Means:
    """Join independent Means (such as of different models' text windows) into one."""
    parts, start = [], 0
    for group in groups:
        parts += [replace(one, places=one.places + start) for one in group.strata]
        start += len(group.names)
    names = tuple(name for group in groups for name in group.names)
    return Means(names, numpy.concatenate([group.values for group in groups]), tuple(parts))


def ratio_of(difference: Estimate) -> Estimate:
    """Return {value, interval} of a ratio, from the difference of two logarithms."""
    bounds = difference["interval"]
    return {
        "value": float(numpy.exp(difference["value"])),
        "interval": bounds and [float(bound) for bound in numpy.exp(bounds)],
    }


def quantile(freedom: float) -> float:
    """Return the half width of an interval in standard errors, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, freedom))


def estimate(value: float, error: float, freedom: float) -> Estimate:
    """Return {value, interval, p} of an estimate with a standard error; interval and p are None if the error is NaN."""
    from scipy.stats import t

    if not numpy.isfinite(error):
        return {"value": value, "interval": None, "p": None}
    if error < ROUNDING:  # every unit differs by the same amount
        return {"value": value, "interval": [value, value], "p": 1.0 if abs(value) < ROUNDING else 0.0}
    half = quantile(freedom) * error
    p = float(2 * t.sf(abs(value) / error, freedom))
    return {"value": value, "interval": [float(value - half), float(value + half)], "p": p}
