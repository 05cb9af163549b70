"""Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): at each rung the better of the arms go on."""

import math

from coppice.core import records


def cut(ablation, arms, eta, output, previous=None):
    """Choose who goes on after a rung and write it to `output`.

    arms: name -> paths of the rung's records, one a seed; previous: the record of the rung before, None at the first.
    One in `eta` of the arms that were still in goes on, at least one; ties go to the arm that is listed first. An arm
    that did not fit its device is out.
    """
    earlier = records.read(previous) if previous else {"survivors": list(arms), "reached": {name: [] for name in arms}}
    every = {name: [records.read(path) for path in arms[name]] for name in earlier["survivors"]}
    found = {name: seeds for name, seeds in every.items() if not any(seed.get("unfit") for seed in seeds)}
    losses = {name: math.fsum(one["validation_loss"] for one in seeds) / len(seeds) for name, seeds in found.items()}
    kept = sorted(losses, key=losses.get)[: max(1, math.ceil(len(losses) / eta))]
    before = {name: earlier["reached"][name][-1]["step"] for name in found if earlier["reached"][name]}
    if any(step == found[name][0]["step"] for name, step in before.items()):
        kept = list(found)  # the same losses as at the rung before
    reached = dict(earlier["reached"])
    for name, seeds in found.items():
        rung = {"share": seeds[0]["share"], "step": seeds[0]["step"], "validation_loss": losses[name]}
        reached[name] = [*reached[name], rung]
    survivors = [name for name in earlier["survivors"] if name in kept]
    records.write(output, {"ablation": ablation, "eta": eta, "survivors": survivors, "reached": reached})
