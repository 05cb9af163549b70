"""Pair several evaluations by a metric: the values of the same rows or windows, and the statistics over them."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from . import across_models, stored_samples, text_metrics
from .metrics import CORPUS, WEIGHTED, WINDOWS, Metric, parts_of


class Sample(NamedTuple):
    """Paired `values` [evaluations, units] of a data set, with what `across_models` needs to know of them.

    Of a score of a corpus, the values are statistics [evaluations, units, s], and `score` maps their totals to it.
    """

    values: Sequence
    weights: Sequence | None = None
    unit: str = stored_samples.ITEMS
    note: str | None = None
    score: Callable[[numpy.ndarray], numpy.ndarray] | None = None

    def means(self, names: Iterable[Hashable]) -> across_models.Means:
        """Return the `Means` over the units, of the columns `names`."""
        if self.score:
            return across_models.scores(names, self.values, self.score)
        return across_models.means(names, self.values, self.weights, self.unit, self.note)


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
            yield over_rows(part, stored_samples.row_values(folders, part.samples, columns(part), remedy))


def columns(metric: Metric) -> tuple[str, ...]:
    """Return the columns of the samples that hold a metric's values for a row."""
    return (metric.values, metric.counts) if metric.counts else (metric.values,)


def over_rows(metric: Metric, rows: Sequence[Sequence[numpy.ndarray]]) -> Sample:
    """Return the `Sample` of a metric that is paired by rows. rows: for each evaluation, its `columns`."""
    found = [own[0] for own in rows]
    if metric.pairing == CORPUS:
        return Sample(found, score=text_metrics.CORPUS_SCORES[metric.values])
    if metric.pairing == WEIGHTED:
        counts = [own[1] for own in rows]
        return Sample([total / numpy.maximum(count, 1) for total, count in zip(found, counts, strict=True)], counts)
    if metric.depth is not None:
        found = [(ranks <= metric.depth).astype(float) for ranks in found]
    return Sample(found)


def means(metric: Metric, names: Sequence, by_seed: Sequence[Sequence[Path]], remedy: str) -> across_models.Means:
    """Return the `Means` of `metric` over the columns `names`; of logarithms if it is compared by ratios.

    Args:
        metric: a metric on a data set, or a mean over several.
        names: the columns.
        by_seed: for each seed, the folder of each column's evaluation. Values are means over the seeds.
        remedy: how an error message ends.
    """
    strata = []
    for each in zip(*(values(metric, folders, remedy) for folders in by_seed), strict=True):
        strata.append(across_models.mean_over_repeats([one.means(names) for one in each]))
    return across_models.mean_of(strata)
