"""The uncertainty of the margin between two candidates, paired over the rows that both were scored on."""

import logging

from coppice.core.aliases import Record
from coppice.stats import metrics, pairing, stored_samples

from . import ranking

logger = logging.getLogger("coppice.selection")


def of(first: ranking.Entry, second: ranking.Entry, metric: str) -> Record:
    """Return {interval, resampled} of `metric` of `second` minus `first`, over what both were scored on.

    interval is [low, high]; resampled says over which units, as `across_models.Means.resampled` does. Both are None if
    the two cannot be paired: one of them was not scored here or has the user's own number, their windows differ
    (because their tokenizers do), or their evaluations do not hold the metric row by row.

    Args:
        first: the candidate whose value is subtracted, as {evaluation: folder or None, measured, given}.
        second: the other candidate, in the same form.
        metric: name of the metric.
    """
    unknown = {"interval": None, "resampled": None}
    both = [entry["measured"].get(metrics.named(metric).key) for entry in (first, second)]
    if None in both or both[0] != both[1] or any(ranking.is_given(one["given"], metric) for one in (first, second)):
        return unknown
    folders = [first["evaluation"], second["evaluation"]]
    try:
        means = pairing.means(both[0], ("first", "second"), [folders], "they are not paired")
    except stored_samples.NotPaired as error:
        logger.info("the margin has no interval: %s", error)
        return unknown
    step, shown = {"second": 1, "first": -1}, means.exp() if both[0].log else means
    return {"interval": shown.contrast(step)["interval"], "resampled": means.resampled(step)}
