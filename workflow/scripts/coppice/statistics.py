"""The statistics of paired comparisons: item by item, window by window, never two independent percentages.

Formulas and sources:

- exact McNemar test (McNemar 1947; exact form: binomial test of the discordant pairs, Fagerland et al. 2013,
  doi:10.1186/1471-2288-13-91), by `statsmodels`;
- paired bootstrap percentile intervals (Efron & Tibshirani 1993, ch. 13), by `scipy.stats.bootstrap`: items (or
  windows) are resampled jointly for all stages, tasks are strata that are resampled on their own;
- Holm's step-down correction (Holm 1979), by `statsmodels`;
- recovered fraction = (finetuned - pruned) / (dense - pruned), undefined where pruning lost nothing.
"""

from dataclasses import dataclass

import numpy

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Paired:
    """Point values [stages] of one quantity and their joint bootstrap distribution [stages, resamples]."""

    values: numpy.ndarray
    distribution: numpy.ndarray

    def map(self, function):
        """The same quantity on another scale, such as exp of a mean loss."""
        return Paired(function(self.values), function(self.distribution))


def paired_means(samples, seed=0, weights=None):
    """Means of `samples` [stages, items] under a bootstrap that draws the same items for every stage.

    With `weights` [items] (tokens of a window), weighted means.
    """
    from scipy.stats import bootstrap

    samples = numpy.asarray(samples, dtype=float)
    weights = numpy.ones(samples.shape[1]) if weights is None else numpy.asarray(weights, dtype=float)
    values = samples @ weights / weights.sum()
    if samples.shape[1] < 2:
        return Paired(values, numpy.repeat(values[:, None], RESAMPLES, axis=1))

    def means(*columns, axis):
        *stages, weight = columns
        return numpy.stack([(stage * weight).sum(axis) / weight.sum(axis) for stage in stages])

    drawn = bootstrap(
        (*samples, weights),
        means,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=200,
        method="percentile",
        rng=numpy.random.default_rng(seed),
    )
    return Paired(values, drawn.bootstrap_distribution)


def mean_of(parts):
    """The unweighted mean of several quantities (tasks), each resampled on its own: strata of one bootstrap."""
    return Paired(
        numpy.mean([part.values for part in parts], axis=0), numpy.mean([part.distribution for part in parts], axis=0)
    )


def interval(draws, level=LEVEL):
    """Percentile interval [low, high] of bootstrap draws."""
    tail = (1 - level) / 2
    low, high = numpy.quantile(draws, [tail, 1 - tail])
    return [float(low), float(high)]


def change(paired, before, after):
    """{value, interval} of stage `after` minus stage `before` (indices into the stages)."""
    draws = paired.distribution[after] - paired.distribution[before]
    return {"value": float(paired.values[after] - paired.values[before]), "interval": interval(draws)}


def recovered_fraction(paired, dense, pruned, finetuned, higher_is_better=True):
    """(finetuned - pruned) / (dense - pruned) as {value, interval, note}; value None where pruning lost nothing.

    The interval is None where in more than one resample of forty pruning lost nothing: the ratio's denominator cannot
    be told from zero, and an interval would be without bounds (Fieller 1954).
    """
    sign = 1 if higher_is_better else -1
    lost = sign * (paired.values[dense] - paired.values[pruned])
    if lost <= 0:
        return {"value": None, "interval": None, "note": "pruning lost nothing"}
    value = float(sign * (paired.values[finetuned] - paired.values[pruned]) / lost)
    losses = sign * (paired.distribution[dense] - paired.distribution[pruned])
    if (losses <= 0).mean() > (1 - LEVEL) / 2:
        return {"value": value, "interval": None, "note": "what pruning lost is within noise"}
    gains = sign * (paired.distribution[finetuned] - paired.distribution[pruned])
    kept = losses > 0
    return {"value": value, "interval": interval(gains[kept] / losses[kept]), "note": None}


def mcnemar(before, after):
    """Exact McNemar test of two boolean arrays over the same items: {p, gained (wrong to right), lost}."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    before, after = numpy.asarray(before, dtype=bool), numpy.asarray(after, dtype=bool)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    if gained + lost == 0:
        return {"p": 1.0, "gained": 0, "lost": 0}
    p = float(test([[0, lost], [gained, 0]], exact=True).pvalue)
    return {"p": min(p, 1.0), "gained": gained, "lost": lost}


def holm(pvalues):
    """Holm-corrected p-values, in the order given."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(pvalues, method="holm")[1]] if pvalues else []


def verdict(change_value, corrected_p, alpha=1 - LEVEL):
    """ "better", "worse" or "no clear change", by the sign of the change and its corrected p-value."""
    if corrected_p >= alpha or change_value == 0:
        return "no clear change"
    return "better" if change_value > 0 else "worse"


def verdict_of_interval(bounds, higher_is_better=True):
    """The same from an interval of the change: clear where zero lies outside it."""
    low, high = bounds
    if low <= 0 <= high:
        return "no clear change"
    return "better" if (low > 0) == higher_is_better else "worse"
