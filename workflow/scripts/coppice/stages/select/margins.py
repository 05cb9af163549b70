"""The uncertainty of the margin between two candidates, paired over the rows that both were scored on."""

import logging

from coppice.stats import metrics, paired_stats, pairing, stored_samples

from . import ranking

logger = logging.getLogger("coppice.selection")


def interval(first: ranking.Entry, second: ranking.Entry, metric: str, seed: int = 0) -> list[float] | None:
    """Return the bootstrap interval [low, high] of `metric` of `second` minus `first`, over the same items or windows.

    Returns None if the two cannot be paired: one of them was not scored here or has the user's own number, their
    windows differ (because their tokenizers do), or their evaluations do not hold the metric row by row.

    Args:
        first: the candidate whose value is subtracted, as {evaluation: folder or None, measured, given}.
        second: the other candidate, in the same form.
        metric: name of the metric.
        seed: seed of the bootstrap.
    """
    both = [entry["measured"].get(metrics.named(metric).key) for entry in (first, second)]
    if None in both or both[0] != both[1] or any(ranking.is_given(one["given"], metric) for one in (first, second)):
        return None
    try:
        found = list(pairing.values(both[0], [first["evaluation"], second["evaluation"]], "they are not paired"))
    except stored_samples.NotPaired as error:
        logger.info("the margin has no interval: %s", error)
        return None
    return paired_stats.change(pairing.resampled(both[0], found, seed), 0, 1)["interval"]
