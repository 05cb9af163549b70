"""The uncertainty of the margin between two candidates, paired over the rows that both were scored on."""

import logging

import numpy

from coppice.stats import paired_stats, stored_samples

from . import ranking

logger = logging.getLogger("coppice.selection")


def interval(first, second, metric, seed=0):
    """Return the bootstrap interval [low, high] of `metric` of `second` minus `first`, over the same items or windows.

    Returns None if the two cannot be paired: one of them was not scored here or has the user's own number, their
    windows differ (because their tokenizers do), or the metric is neither an accuracy nor a perplexity.

    Args:
        first, second: {evaluation: folder or None, tasks, given}.
        metric: name of the metric.
        seed: seed of the bootstrap.
    """
    folders = [first["evaluation"], second["evaluation"]]
    if None in folders or any(ranking.is_given(entry["given"], metric) for entry in (first, second)):
        return None
    names = first["tasks"] if metric in ("average_acc", "acc") else [metric]
    if not metric.startswith("ppl.") and not set(names) <= {*first["tasks"]} & {*second["tasks"]}:
        return None
    try:
        paired = _paired(folders, metric, names, seed)
    except stored_samples.NotPaired as error:
        logger.info("the margin has no interval: %s", error)
        return None
    return paired_stats.change(paired, 0, 1)["interval"]


def _paired(folders, metric, tasks, seed):
    if metric.startswith("ppl."):
        losses, tokens = stored_samples.window_losses(folders, metric.removeprefix("ppl."), "they are not paired")
        return paired_stats.paired_means(losses, seed, tokens).map(numpy.exp)
    right = [stored_samples.right_and_wrong(folders, name, "they are not paired") for name in tasks]
    return paired_stats.mean_of([paired_stats.paired_means(samples, seed) for samples in right])
