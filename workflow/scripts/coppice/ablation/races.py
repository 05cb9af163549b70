"""Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): at each rung only the best arms continue."""

import math
from collections.abc import Mapping, Sequence

from coppice.core import records
from coppice.core.aliases import PathLike, Record


def cut(
    ablation: str,
    arms: Mapping[str, Sequence[PathLike]],
    eta: float,
    output: PathLike,
    previous: PathLike | None = None,
) -> None:
    """Choose the arms that continue after a rung, and write them to the record `output`.

    One in `eta` of the arms continues, at least one, by the mean validation loss over seeds; among equal arms the one
    listed first wins. Arms that did not fit on their device or that diverged are excluded.

    Args:
        ablation: the name of the ablation.
        arms: name -> paths of the rung's records, one per seed.
        eta: the factor by which the number of arms falls.
        output: the file to write.
        previous: the record of the rung before; None at the first rung.
    """
    first = {"survivors": list(arms), "reached": {name: [] for name in arms}}
    earlier: Record = records.read(previous) if previous else first
    every = {name: [records.read(path) for path in arms[name]] for name in earlier["survivors"]}
    found = {name: seeds for name, seeds in every.items() if not any(seed.get("unfit") for seed in seeds)}
    losses = {name: math.fsum(one["validation_loss"] for one in seeds) / len(seeds) for name, seeds in found.items()}
    kept = sorted(losses, key=lambda name: losses[name])[: max(1, math.ceil(len(losses) / eta))]
    before = {name: earlier["reached"][name][-1]["step"] for name in found if earlier["reached"][name]}
    if any(step == found[name][0]["step"] for name, step in before.items()):
        kept = list(found)  # this rung falls on the same step as the one before, so nothing new is known: keep all
    reached = dict(earlier["reached"])
    for name, seeds in found.items():
        rung = {"share": seeds[0]["share"], "step": seeds[0]["step"], "validation_loss": losses[name]}
        reached[name] = [*reached[name], rung]
    survivors = [name for name in earlier["survivors"] if name in kept]
    records.write(output, {"ablation": ablation, "eta": eta, "survivors": survivors, "reached": reached})
