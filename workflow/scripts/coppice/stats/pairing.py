"""Pair several evaluations by a metric: the values of the same rows or windows, and the statistics over them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from . import across_models, stored_samples
from .metrics import WINDOWS, Metric, parts_of


class Sample(NamedTuple):
    """Paired `values` [evaluations, units] of a data set, with the arguments of `across_models.means` for them."""

    values: list
    weights: list | None
    unit: str
    note: str | None


def values(metric: Metric, folders: Sequence[Path], remedy: str) -> Iterator[Sample]:
    """Yield the paired values of each data set that `metric` is measured on.

    Args:
        metric: a metric on a data set, or a mean over several.
        folders: the folders of the evaluations.
        remedy: how an error message ends.

    Yields:
        a `Sample`. Values under a metric that is compared by ratios are logarithms.

    Raises:
        NotPaired: The evaluations have different rows, documents or windows.
    """
    for part in parts_of(metric):
        if part.pairing == WINDOWS:
            texts = [stored_samples.losses(folder)["perplexity"][part.name] for folder in folders]
            yield Sample(*stored_samples.text_losses(texts, part.name, remedy))
        else:
            rows = stored_samples.row_values(folders, part.name, part.values, remedy)
            yield Sample(rows, None, stored_samples.ITEMS, None)


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
        rows = numpy.mean([one.values for one in each], axis=0)
        strata.append(across_models.means(names, rows, each[0].weights, each[0].unit, each[0].note))
    return across_models.mean_of(strata)
