"""Test changes from pairs, item by item, never from two independent percentages; call them better, worse or unclear.

Formulas and sources:

- exact McNemar test (McNemar 1947; exact form: binomial test of the discordant pairs, Fagerland et al. 2013,
  doi:10.1186/1471-2288-13-91), with `statsmodels`;
- Holm's step-down correction (Holm 1979), with `statsmodels`;
- permutation tests over models (Fisher 1935, Manly 2007), with `scipy.stats`.

Means, their differences and recovered fractions, with intervals, are in `coppice.stats.across_models`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy
from numpy.typing import ArrayLike

from coppice.core.aliases import Estimate, Record

LEVEL = 0.95


def mcnemar(before: ArrayLike, after: ArrayLike) -> dict[str, float]:
    """Return {p, gained_items, lost_items} of the exact McNemar test of two boolean arrays over the same items.

    gained_items went from wrong to right, lost_items from right to wrong; items that did not change do not count.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    before, after = numpy.asarray(before, dtype=bool), numpy.asarray(after, dtype=bool)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    p = float(test([[0, lost], [gained, 0]], exact=True).pvalue) if gained + lost else 1.0
    return {"p": min(p, 1.0), "gained_items": gained, "lost_items": lost}


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return the Holm-corrected p-values, in the given order."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(pvalues, method="holm")[1]] if pvalues else []


def verdict(change_value: float, corrected_p: float, alpha: float = 1 - LEVEL) -> str:
    """Return "better", "worse" or "no clear change", from the sign of the change and its corrected p-value."""
    if corrected_p >= alpha or change_value == 0:
        return "no clear change"
    return "better" if change_value > 0 else "worse"


def verdict_of_interval(bounds: Sequence[float] | None, higher_is_better: bool = True) -> str:
    """Return the same verdict from an interval of the change: it is clear only if the interval excludes zero."""
    if bounds is None:
        return "no clear change"
    low, high = bounds
    if low <= 0 <= high:
        return "no clear change"
    return "better" if (low > 0) == higher_is_better else "worse"


def apart(first: Estimate, second: Estimate) -> dict[str, float]:
    """Return {value, p} of the difference of two independent estimates with intervals, each assumed to be normal."""
    from scipy.stats import norm

    width = 2 * norm.ppf(0.5 + LEVEL / 2)
    errors = [(high - low) / width for low, high in (first["interval"], second["interval"])]
    value = first["value"] - second["value"]
    spread = float(numpy.hypot(*errors))
    return {"value": value, "p": float(2 * norm.sf(abs(value) / spread)) if spread else float(value == 0)}


def over_seeds(values: Iterable[float], level: float = LEVEL) -> Record:
    """Summarize repeated runs as {n, mean, sd, interval, values}; sd and interval are None for a single run.

    The interval of the mean is Student's t with n - 1 degrees of freedom (`scipy.stats.ttest_1samp`), because the seeds
    are a sample of all possible seeds: a random factor.
    """
    from scipy.stats import ttest_1samp

    values = [float(value) for value in values]
    summary = {"n": len(values), "mean": float(numpy.mean(values)), "sd": None, "interval": None, "values": values}
    if len(values) > 1:
        low, high = ttest_1samp(values, 0.0).confidence_interval(level) if numpy.ptp(values) else (values[0], values[0])
        summary |= {"sd": float(numpy.std(values, ddof=1)), "interval": [float(low), float(high)]}
    return summary


def sign_flip(differences: ArrayLike, seed: int = 0) -> float | None:
    """Return the two-sided p-value of paired differences under the hypothesis that each sign is equally likely.

    This permutation test over units uses `scipy.stats.permutation_test`; it is exact up to 13 units (Fisher 1935,
    ch. 21). None for fewer than two units.
    """
    from scipy.stats import permutation_test

    differences = numpy.asarray(differences, dtype=float)
    if len(differences) < 2:
        return None
    found = permutation_test(
        (differences, numpy.zeros(len(differences))),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        rng=numpy.random.default_rng(seed),
    )
    return float(found.pvalue)


def groups_differ(groups: Iterable[ArrayLike], seed: int = 0) -> float | None:
    """Return the p-value of several groups of units under the hypothesis that they share one mean.

    This is a one-way analysis of variance by permutation with `scipy.stats.permutation_test`, exact if feasible.
    The statistic is the sum of squares between groups, which orders the permutations as F does (Manly 2007, ch. 7).
    Unlike F, it does not amplify rounding errors if the units of a group agree. None if a group has fewer than two
    units, or if there is only one group.
    """
    from scipy.stats import permutation_test

    groups = [numpy.asarray(group, dtype=float) for group in groups]
    if len(groups) < 2 or min(len(group) for group in groups) < 2:
        return None
    # without the overall mean, the sum of n * mean^2 over groups is the sum of squares between groups
    centre = numpy.concatenate(groups).mean()

    def between(*samples: numpy.ndarray, axis: int) -> numpy.ndarray | numpy.floating:
        return sum(sample.shape[axis] * sample.mean(axis=axis) ** 2 for sample in samples)

    found = permutation_test(
        [group - centre for group in groups],
        between,
        permutation_type="independent",
        alternative="greater",
        vectorized=True,
        rng=numpy.random.default_rng(seed),
    )
    return float(found.pvalue)
