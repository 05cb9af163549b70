"""Write the report of an ablation: a self-contained HTML page, the same as Markdown, a CSV file and the figures."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.render import html
from coppice.stats.metrics import Metric
from coppice.study.settings.resolved import ArmComparison, StudyStage
from coppice.study.settings.sections.ablation import ChooseBy

from . import figures, formats, reading, recommendation, tables
from .reading import Arm

logger = logging.getLogger("coppice.ablation")

TEMPLATES = Path(__file__).parent / "templates"
PAGES = ("ablation_report.html", "ablation_report.md")


def write(
    name: str,
    ablation: ArmComparison,
    start: str,
    arms: Mapping[str, Sequence[PathLike]],
    winners: Iterable[PathLike],
    survivors: PathLike | None,
    output: PathLike,
) -> None:
    """Write `ablation_report.{html,md}`, `ablation.csv` and `figures/` to the folder `output`.

    Arms that were not trained like the others are named in the report and left out of the comparisons.

    Args:
        name: the name of the ablation.
        ablation: how its arms are compared.
        start: the name of the starting checkpoint.
        arms: name -> paths of its arm.json, one per seed.
        winners: paths of the stages' records, in order.
        survivors: path of the record of a race's last rung, or None.
        output: the folder to write.
    """
    output = Path(output)
    found = [reading.arm(arm, paths) for arm, paths in arms.items()]
    compared = _Compared(
        found=found,
        problems=reading.unequal(found, ablation.budget),
        won=[records.read(path) for path in winners],
        race=records.read(survivors) if survivors else None,
    )
    for sentences in compared.problems.values():
        logger.error("%s", "; ".join(sentences))
    drawn = figures.draw(compared.fair, _axes(compared.fair, ablation.choose_by), output / "figures")
    content = _content(name, ablation, start, compared)
    for page in PAGES:
        text = html.render(TEMPLATES, f"{page}.j2", content | {"svg": drawn})
        with records.atomic(output / page) as file:
            file.write(text)
    with records.atomic(output / "ablation.csv") as file:
        tables.frame(found, compared.problems).to_csv(file, index=False)
    logger.info("%s", content["answer"]["sentence"])


@dataclass(frozen=True)
class _Compared:
    """What the records of an ablation hold."""

    found: list[Arm]
    """All arms."""
    problems: dict[str, list[str]]
    """Arm -> sentences on why it cannot be compared."""
    won: list[Record]
    """The records of the stages' winners, in order."""
    race: Record | None
    """The record of a race's last rung."""

    @cached_property
    def fair(self) -> list[Arm]:
        """The arms that can be compared."""
        return [arm for arm in self.found if arm.trained and arm.name not in self.problems]


def _axes(fair: Sequence[Arm], choose_by: ChooseBy) -> list[tuple[Metric, str]]:
    """Return (metric, part) of the quality figure: the metric that ranks the arms, and the report's main one."""
    rows = [(reading.ranking_metric(choose_by), "selection")]
    main = recommendation.main_metric(fair)
    if main and sum(arm.measured("report") for arm in fair) > 1:
        rows.append((main, "report"))
    return rows


def _content(name: str, ablation: ArmComparison, start: str, compared: _Compared) -> Record:
    found, fair, problems, won = compared.found, compared.fair, compared.problems, compared.won
    by_name = {arm.name: arm for arm in fair}
    reference = by_name.get(ablation.reference) or next(iter(fair), None)
    return {
        "name": name,
        "start": start,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "budget": formats.budget(ablation.budget),
        "seeds": [str(seed) for seed in found[0].runs],
        "choose_by": formats.label(reading.ranking_metric(ablation.choose_by), "selection"),
        "reference": _named(reference, ablation.reference),
        "problems": [sentence for sentences in problems.values() for sentence in sentences],
        "answer": _answer(ablation, by_name, reference, won),
        "arms": tables.arms(found, problems),
        "differences": _differences(fair, reference, ablation.stages),
        "stages": tables.stages(won) if won else None,
        "sides": tables.sides(fair),
        "race": _race(compared.race, found) if compared.race else None,
        "figures": [(one, *figures.CAPTIONS[one]) for one in figures.FIGURES],
        "provenance": _facts(fair or found),
    }


def _named(reference: Arm | None, wanted: str) -> str:
    """Return the name of the reference arm, with a note if it is not the configured one."""
    if reference is None or reference.name == wanted:
        return wanted
    return f"{reference.name} (instead of {wanted}, which cannot be compared)"


def _differences(fair: Sequence[Arm], reference: Arm | None, stages: Sequence[StudyStage]) -> tables.Table | None:
    return tables.differences(fair, reference, losses=not stages) if len(fair) > 1 else None


def _answer(
    ablation: ArmComparison, by_name: Mapping[str, Arm], reference: Arm | None, won: Sequence[Record]
) -> Record:
    if ablation.stages and {"start", "combination"} <= by_name.keys():
        answer = recommendation.validated(by_name["start"], by_name["combination"])
        chosen = [f"stage {winner['stage']}: {winner['winner']}" for winner in won]
        combined = f"the combination is {formats.settings(by_name['combination'])}"
        return answer | {"evidence": [*answer["evidence"], *chosen, combined]}
    if not ablation.stages and len(by_name) > 1:
        arms = list(by_name.values())
        return recommendation.recommend(arms, ablation.choose_by, reference)
    return {
        "verdict": "none",
        "sentence": "No recommendation: fewer than two arms can be compared.",
        "evidence": [],
    }


def _race(race: Record, found: Sequence[Arm]) -> list[str]:
    """Return sentences on what a race saved and what it risked."""
    out = {arm.name: rung for arm in found if (rung := arm.raced_out)}
    if not out:
        return []
    saved = sum(1 - rung["share"] for rung in out.values()) / len([arm for arm in found if not arm.unfit])
    lines = [f"The race saved {100 * saved:.0f} % of the cost of training all arms to the end."]
    for name in out:
        rungs = race["reached"][name]
        rung = rungs[-1]
        kept = [
            other[len(rungs) - 1]["validation_loss"]
            for arm, other in race["reached"].items()
            if len(other) > len(rungs) or arm in race["survivors"]
        ]
        behind = rung["validation_loss"] - max(kept)
        lines.append(
            f"{name} was stopped at step {rung['step']}, when its validation loss was {behind:.4f} above that of the "
            "worst arm that continued. It might have overtaken that arm later: this is the risk of a race."
        )
    return lines


def _facts(found: Sequence[Arm]) -> list[tuple[str, str]]:
    """Return (name, value) pairs on the first arm's training: checkpoint, device, data and package versions."""
    provenance = next((run["provenance"] for arm in found for run in arm.runs.values() if "provenance" in run), None)
    if provenance is None:
        return []
    prints = provenance["fingerprints"]
    rows = [("checkpoint", prints["weights"][:12]), ("device", provenance["device"])]
    rows += [(f"training data {name}", value[:12]) for name, value in prints["datasets"].items()]
    return [*rows, *provenance["versions"].items()]
