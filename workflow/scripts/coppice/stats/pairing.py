"""Pair several evaluations by a metric: the values of the same rows or windows, and the statistics over them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

from . import across_models, paired_stats, stored_samples
from .metrics import WINDOWS, Metric, parts_of


def values(metric: Metric, folders: Sequence[Path], remedy: str) -> Iterator[tuple]:
    """Yield the paired values of each data set that `metric` is measured on.

    Args:
        metric: a metric on a data set, or a mean over several.
        folders: the folders of the evaluations.
        remedy: how an error message ends.

    Yields:
        (values [evaluations, rows or windows], weights [rows or windows] or None). Values under a metric that is
        compared by ratios are logarithms.

    Raises:
        NotPaired: The evaluations have different rows or windows.
    """
    for part in parts_of(metric):
        if part.pairing == WINDOWS:
            yield stored_samples.window_losses(folders, part.name, remedy)
        else:
            yield stored_samples.row_values(folders, part.name, part.values, remedy), None


def resampled(metric: Metric, found: Sequence[tuple], seed: int = 0) -> paired_stats.Paired:
    """Return the point values of `metric` and their joint bootstrap, from all that `values` yielded."""
    parts = [paired_stats.paired_means(rows, seed, weights) for rows, weights in found]
    mean = paired_stats.mean_of(parts)
    return mean.map(numpy.exp) if metric.log else mean


def means(metric: Metric, names: Sequence, by_seed: Sequence[Sequence[Path]], remedy: str) -> across_models.Means:
    """Return the `Means` of `metric` over the columns `names`; of logarithms if it is compared by ratios.

    Args:
        metric: a metric on a data set, or a mean over several.
        names: the columns.
        by_seed: for each seed, the folder of each column's evaluation. A row's value is the mean over the seeds.
        remedy: how an error message ends.
    """
    strata = []
    for each in zip(*(values(metric, folders, remedy) for folders in by_seed), strict=True):
        strata.append(across_models.means(names, numpy.mean([rows for rows, _ in each], axis=0), each[0][1]))
    return across_models.mean_of(strata)
