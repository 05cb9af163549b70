"""How sure the margin between two candidates is: paired over the rows that both were scored on."""

import numpy

from .. import pairing, statistics

AGAIN = "delete the scores of both candidates and run snakemake again"


def interval(first, second, metric, seed=0):
    """Bootstrap interval [low, high] of `metric` of `second` minus that of `first`, over the same items or windows.

    first, second: {evaluation: folder or None, given}. None where one of them was not scored here, or where its user
    gave the number: there is nothing to resample.
    """
    folders = [first["evaluation"], second["evaluation"]]
    if None in folders or any(_is_given(entry, metric) for entry in (first, second)):
        return None
    paired = _paired(folders, metric, first["tasks"], seed)
    return statistics.change(paired, 0, 1)["interval"]


def _is_given(entry, metric):
    return metric in entry["given"] or (metric == "average_acc" and "acc" in entry["given"])


def _paired(folders, metric, tasks, seed):
    if metric.startswith("ppl."):
        losses, tokens = pairing.window_losses(folders, metric.removeprefix("ppl."), AGAIN)
        return statistics.paired_means(losses, seed, tokens).map(numpy.exp)
    names = tasks if metric == "average_acc" else [metric]
    return statistics.mean_of(
        [statistics.paired_means(pairing.right_and_wrong(folders, name, AGAIN), seed) for name in names]
    )
