"""Arms compared on the same examples, items and windows: differences with intervals, corrected for their number.

A quantity of several arms is a `contrasts.Means`: validation losses weighted by target tokens, accuracies as the mean
of tasks, perplexities as log-perplexities weighted by tokens. Where arms were trained with several seeds, an item's
value is the mean over them; the validation examples of each seed are others and stand beside each other.
"""

import math
from itertools import chain

import numpy

from .. import contrasts, pairing, records, statistics
from .reading import LOSS

AGAIN = "delete the arm's folder and run snakemake again"
EACH = "validation_losses.json"


def joint(arms, metric, part):
    """The Means of `metric` over `arms`, by name, on the rows of `part` (which the validation loss does not have)."""
    names = [arm.name for arm in arms]
    if metric == LOSS:
        return _losses(arms, names)
    by_seed = list(zip(*([folder / part for folder in arm.folders.values()] for arm in arms), strict=True))
    if metric.startswith("ppl."):
        texts = [pairing.window_losses(folders, metric.removeprefix("ppl."), AGAIN) for folders in by_seed]
        return contrasts.means(names, numpy.mean([losses for losses, _ in texts], axis=0), texts[0][1])
    tasks = arms[0].evaluations(part)[0]["zero_shot"] if metric == "average_acc" else [metric]
    return contrasts.mean_of([_right(names, by_seed, task) for task in tasks])


def _right(names, by_seed, task):
    seeds = [pairing.right_and_wrong(folders, task, AGAIN) for folders in by_seed]
    return contrasts.means(names, numpy.mean(seeds, axis=0))


def _losses(arms, names):
    """Of every validation example of every seed: loss a target token."""
    read = [[records.read(folder / EACH) for folder in arm.folders.values()] for arm in arms]
    tokens = [list(chain.from_iterable(one["tokens"] for one in seeds)) for seeds in read]
    if any(counted != tokens[0] for counted in tokens):
        raise ValueError("the arms have other validation examples")  # `reading.unequal` has been asked before
    losses = numpy.array([list(chain.from_iterable(one["losses"] for one in seeds)) for seeds in read])
    return contrasts.means(names, losses / numpy.array(tokens[0]), tokens[0])


def differences(arms, reference, metric, part, lower_is_better):
    """arm -> {value, interval, p, p_holm, by_seed, verdict} of its difference to `reference` (one of `arms`).

    Of a perplexity the difference is that of its logarithm, of accuracies in shares of 1. p is corrected by Holm over
    the arms. A verdict (better, worse, no clear change) is clear only where all seeds point the same way.
    """
    others = [arm for arm in arms if arm.name != reference.name]
    if not others:
        return {}
    means = joint(arms, metric, part)
    found = {arm.name: means.contrast({arm.name: 1, reference.name: -1}) for arm in others}
    corrected = statistics.holm([1.0 if one["p"] is None else one["p"] for one in found.values()])
    sign = -1 if lower_is_better else 1
    for arm, p in zip(others, corrected, strict=True):
        seeds = _by_seed(arm, reference, metric, part)
        agree = len({value > 0 for value in seeds}) == 1
        verdict = statistics.verdict(sign * found[arm.name]["value"], p) if agree else "no clear change"
        found[arm.name] |= {"p_holm": p, "by_seed": seeds, "verdict": verdict}
    return found


def _by_seed(arm, reference, metric, part):
    scale = math.log if metric.startswith("ppl.") else float
    pairs = zip(arm.values(metric, part), reference.values(metric, part), strict=True)
    return [scale(one) - scale(other) for one, other in pairs]
