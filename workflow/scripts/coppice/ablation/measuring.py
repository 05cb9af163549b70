"""Compare arms on the same examples, items and texts: differences with intervals and corrected p-values.

The values of several arms are one `across_models.Means`: validation losses weighted by target tokens, accuracies as the
mean over tasks, log-perplexities weighted by tokens. If arms were trained with several seeds, the value of an item is
the mean over the seeds. Each seed holds out other validation examples, and some examples are held out by several seeds.
"""

import math
from collections.abc import Sequence

import numpy

from coppice.core import records
from coppice.core.aliases import Estimate
from coppice.stats import across_models, paired_stats, pairing
from coppice.stats.metrics import LOSS, Metric

from .reading import Arm

AGAIN = "delete the arm's folder and run snakemake again"
EXAMPLE_LOSSES_FILE = "validation_losses.json"


def joint(arms: Sequence[Arm], metric: Metric, part: str) -> across_models.Means:
    """Return the Means of a `Metric` over `arms`, by name.

    part: "selection" or "report" rows; the validation loss ignores it.
    """
    names = [arm.name for arm in arms]
    if metric.key == LOSS.key:
        return _losses(arms, names)
    if metric.mean_of:
        metric = metric.on(*arms[0].evaluations(part)[0][metric.mean_of])
    by_seed = list(zip(*([folder / part for folder in arm.folders.values()] for arm in arms), strict=True))
    return pairing.means(metric, names, by_seed, AGAIN)


def _losses(arms: Sequence[Arm], names: Sequence[str]) -> across_models.Means:
    """Return the Means of the loss per target token of each validation example, over the seeds that held it out."""
    read = [[records.read(folder / EXAMPLE_LOSSES_FILE) for folder in arm.folders.values()] for arm in arms]
    held_out = [[(one["rows"], one["tokens"]) for one in seeds] for seeds in read]
    if any(rows != held_out[0] for rows in held_out):
        raise ValueError("the arms have different validation examples")  # a defect: `reading.unequal` excludes these
    found, weights = {}, {}
    for place, seeds in enumerate(read):
        for one in seeds:
            for row, loss, tokens in zip(one["rows"], one["losses"], one["tokens"], strict=True):
                found.setdefault(row, [[] for _ in arms])[place].append(loss / tokens)
                weights[row] = tokens
    samples = [[sum(each[place]) / len(each[place]) for each in found.values()] for place in range(len(arms))]
    return across_models.means(names, samples, list(weights.values()))


def differences(arms: Sequence[Arm], reference: Arm, metric: Metric, part: str) -> dict[str, dict]:
    """Return arm -> {value, interval, p, p_holm, by_seed, verdict, resampled}: its difference to `reference`.

    Of a metric that is compared by ratios, they are differences of logarithms. With several seeds,
    the variance between seeds (pooled over the arms) is added to the variance over items, with Student's t for the
    degrees of freedom of the former. p is corrected over the arms by Holm. The verdict is better, worse or no clear
    change; it is better or worse only if the differences of all seeds have the same sign.
    """
    others = [arm for arm in arms if arm.name != reference.name]
    if not others:
        return {}
    means = joint(arms, metric, part)
    steps = {arm.name: {arm.name: 1, reference.name: -1} for arm in others}
    seeds = {arm.name: _by_seed(arm, reference, metric, part) for arm in others}
    found = {name: _with_seeds(means, step, list(seeds.values())) for name, step in steps.items()}
    corrected = paired_stats.holm([1.0 if one["p"] is None else one["p"] for one in found.values()])
    sign = 1 if metric.higher_is_better else -1
    for arm, p in zip(others, corrected, strict=True):
        agree = len({numpy.sign(value) for value in seeds[arm.name]} - {0}) == 1
        verdict = paired_stats.verdict(sign * found[arm.name]["value"], p) if agree else "no clear change"
        found[arm.name] |= {"p_holm": p, "by_seed": seeds[arm.name], "verdict": verdict}
        found[arm.name]["resampled"] = means.resampled(steps[arm.name])
    return found


def _with_seeds(means: across_models.Means, step: across_models.Terms, by_seed: Sequence[Sequence[float]]) -> Estimate:
    """Return {value, interval, p} of a difference, with the variance between seeds included.

    step: the difference, as name -> weight; by_seed: the differences of every arm by seed.
    """
    found, count = means.contrast(step), len(by_seed[0])
    if count < 2 or found["interval"] is None:
        return found
    over_items, _ = means.error(step)
    between = numpy.mean([numpy.var(values, ddof=1) for values in by_seed]) / count
    error = float(numpy.hypot(over_items, numpy.sqrt(between)))
    return across_models.estimate(found["value"], error, (count - 1) * len(by_seed))


def _by_seed(arm: Arm, reference: Arm, metric: Metric, part: str) -> list[float]:
    scale = math.log if metric.log else float
    pairs = zip(arm.values(metric, part), reference.values(metric, part), strict=True)
    return [scale(one) - scale(other) for one, other in pairs]
