"""Choose the winner of a stage in a staged ablation: the best arm, on data that the report does not use."""

from collections.abc import Mapping, Sequence

from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CoppiceError
from coppice.stats.metrics import Metric
from coppice.study.settings.resolved import Budget
from coppice.study.settings.sections.ablation import ChooseBy

from . import measuring, reading
from .reading import Arm


def decide(
    ablation: str,
    stage: str,
    arms: Mapping[str, Sequence[PathLike]],
    choose_by: ChooseBy,
    budget: Budget,
    output: PathLike,
    before: PathLike | None = None,
) -> None:
    """Write the record of a stage's winner: its settings, which the next stage starts from, and its lead.

    The record's key `trained` lists the settings of all arms so far, so that no later stage trains one of them again.

    Args:
        ablation: its name.
        stage: its name.
        arms: name -> paths of its arm.json, one per seed; among equal arms the one listed first wins.
        choose_by: how arms are ranked.
        budget: what every arm may spend.
        output: the file to write.
        before: the record of the previous stage, or None.

    Raises:
        CoppiceError: An arm was not trained like the others, or none was trained to the end.
    """
    found = [reading.arm(name, paths) for name, paths in arms.items()]
    reading.check_equal(ablation, found, budget)
    metric = reading.ranking_metric(choose_by)
    values = {arm.name: arm.value(metric) for arm in found if arm.trained}
    sign = 1 if metric.higher_is_better else -1
    if not values:
        raise CoppiceError(f"ablation {ablation}, stage {stage}: no arm was trained to the end ({found[0].unfit})")
    order = sorted(values, key=lambda name: -sign * values[name])
    by_name = {arm.name: arm for arm in found}
    winner = by_name[order[0]]
    content: Record = {"ablation": ablation, "stage": stage, "winner": winner.name, "settings": winner.settings}
    content |= {"flat": winner.first["flat"]}
    content |= {"choose_by": choose_by.model_dump(), "values": values, "runner_up": None}
    if len(order) > 1:
        content["runner_up"] = _margin(winner, by_name[order[1]], metric)
    trained = [{"arm": arm.name, "settings": arm.settings} for arm in found if arm.trained]
    content["trained"] = [*(records.read(before)["trained"] if before else []), *trained]
    records.write(output, content)


def _margin(winner: Arm, second: Arm, metric: Metric) -> Record:
    """Return {arm, value, interval, p, verdict, resampled}: the runner-up minus the winner, over the same rows."""
    found = measuring.differences([winner, second], winner, metric, "selection")[second.name]
    return {"arm": second.name, **{key: found[key] for key in ("value", "interval", "p", "verdict", "resampled")}}
