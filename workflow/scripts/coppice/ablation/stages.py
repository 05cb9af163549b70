"""Who wins a stage of a staged ablation: the arm with the best value, on data that the report does not use."""

from coppice.core import records
from coppice.core.errors import CoppiceError

from . import measuring, reading


def decide(ablation, stage, arms, choose_by, budget, output, before=None):
    """Write the record of a stage's winner: its settings, which the next stage goes on from, and how sure it is.

    arms: name -> paths of its arm.json, one a seed, in the order in which ties are broken; choose_by: {metric, mode};
    budget: what all arms may spend; before: the record of the stage before. `trained` lists the settings of all arms so
    far, so that none is trained twice. Raises CoppiceError where an arm was not trained as the others were.
    """
    found = [reading.arm(name, paths) for name, paths in arms.items()]
    reading.check_equal(ablation, found, budget)
    values = {arm.name: arm.value(choose_by["metric"]) for arm in found if arm.trained}
    sign = 1 if choose_by["mode"] == "max" else -1
    if not values:
        raise CoppiceError(f"ablation {ablation}, stage {stage}: no arm was trained to the end: {found[0].unfit}")
    order = sorted(values, key=lambda name: -sign * values[name])
    by_name = {arm.name: arm for arm in found}
    winner = by_name[order[0]]
    content = {"ablation": ablation, "stage": stage, "winner": winner.name, "settings": winner.settings}
    content |= {"flat": winner.first["flat"]}
    content |= {"choose_by": choose_by, "values": values, "runner_up": None}
    if len(order) > 1:
        content["runner_up"] = _margin(winner, by_name[order[1]], choose_by)
    trained = [{"arm": arm.name, "settings": arm.settings} for arm in found if arm.trained]
    content["trained"] = [*(records.read(before)["trained"] if before else []), *trained]
    records.write(output, content)


def _margin(winner, second, choose_by):
    """{arm, value, interval, p, verdict} of the runner-up's difference to the winner, paired over the same rows."""
    metric, lower = choose_by["metric"], choose_by["mode"] == "min"
    found = measuring.differences([winner, second], winner, metric, "selection", lower)[second.name]
    return {"arm": second.name, **{key: found[key] for key in ("value", "interval", "p", "verdict")}}
