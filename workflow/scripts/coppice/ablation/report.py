"""Write the report of an ablation: a self-contained HTML page, the same as Markdown, a CSV file and the figures."""

import logging
import time
from pathlib import Path

from coppice.core import records
from coppice.render import html

from . import figures, formats, reading, recommendation, tables

logger = logging.getLogger("coppice.ablation")

TEMPLATES = Path(__file__).parent / "templates"
PAGES = ("ablation_report.html", "ablation_report.md")


def write(name, ablation, start, arms, winners, survivors, output):
    """Write `ablation_report.{html,md}`, `ablation.csv` and `figures/` to the folder `output`.

    Arms that were not trained like the others are named in the report and left out of the comparisons.

    Args:
        name: the name of the ablation.
        ablation: its {budget, choose_by, reference, stages}.
        start: the name of the starting checkpoint.
        arms: name -> paths of its arm.json, one per seed.
        winners: paths of the stages' records, in order.
        survivors: path of the record of a race's last rung, or None.
        output: the folder to write.
    """
    output = Path(output)
    found = [reading.arm(arm, paths) for arm, paths in arms.items()]
    problems = reading.unequal(found, ablation["budget"])
    for sentences in problems.values():
        logger.error("%s", "; ".join(sentences))
    won = [records.read(path) for path in winners]
    race = records.read(survivors) if survivors else None
    fair = [arm for arm in found if arm.trained and arm.name not in problems]
    drawn = figures.draw(fair, _axes(fair, ablation["choose_by"]), output / "figures")
    content = _content(name, ablation, start, found, fair, problems, won, race)
    for page in PAGES:
        text = html.render(TEMPLATES, f"{page}.j2", content | {"svg": drawn})
        with records.atomic(output / page) as file:
            file.write(text)
    with records.atomic(output / "ablation.csv") as file:
        tables.frame(found, problems).to_csv(file, index=False)
    logger.info("%s", content["answer"]["sentence"])


def _axes(fair, choose_by):
    """Return (metric, part) of the quality figure: the metric that ranks the arms, and the report's main one."""
    rows = [(reading.ranking_metric(choose_by), "selection")]
    main = recommendation.main_metric(fair)
    if main and sum(arm.measured("report") for arm in fair) > 1:
        rows.append((main, "report"))
    return rows


def _content(name, ablation, start, found, fair, problems, won, race):
    by_name = {arm.name: arm for arm in fair}
    reference = by_name.get(ablation["reference"]) or next(iter(fair), None)
    return {
        "name": name,
        "start": start,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "budget": formats.budget(ablation["budget"]),
        "seeds": [str(seed) for seed in found[0].runs],
        "choose_by": formats.label(reading.ranking_metric(ablation["choose_by"]), "selection"),
        "reference": _named(reference, ablation["reference"]),
        "problems": [sentence for sentences in problems.values() for sentence in sentences],
        "answer": _answer(ablation, by_name, reference, won),
        "arms": tables.arms(found, problems),
        "differences": _differences(fair, reference, ablation["stages"]),
        "stages": tables.stages(won) if won else None,
        "sides": tables.sides(fair),
        "race": _race(race, found) if race else None,
        "figures": [(one, *figures.CAPTIONS[one]) for one in figures.FIGURES],
        "provenance": _facts(fair or found),
    }


def _named(reference, wanted):
    """Return the name of the reference arm, with a note if it is not the configured one."""
    if reference is None or reference.name == wanted:
        return wanted
    return f"{reference.name} (instead of {wanted}, which cannot be compared)"


def _differences(fair, reference, stages):
    return tables.differences(fair, reference, losses=not stages) if len(fair) > 1 else None


def _answer(ablation, by_name, reference, won):
    if ablation["stages"] and {"start", "combination"} <= by_name.keys():
        answer = recommendation.validated(by_name["start"], by_name["combination"])
        chosen = [f"stage {winner['stage']}: {winner['winner']}" for winner in won]
        combined = f"the combination is {formats.settings(by_name['combination'])}"
        return answer | {"evidence": [*answer["evidence"], *chosen, combined]}
    if not ablation["stages"] and len(by_name) > 1:
        arms = list(by_name.values())
        return recommendation.recommend(arms, ablation["choose_by"], reference)
    return {
        "verdict": "none",
        "sentence": "No recommendation: fewer than two arms can be compared.",
        "evidence": [],
    }


def _race(race, found):
    """Return sentences on what a race saved and what it risked."""
    out = [arm for arm in found if arm.raced_out]
    if not out:
        return []
    saved = sum(1 - arm.raced_out["share"] for arm in out) / len([arm for arm in found if not arm.unfit])
    lines = [f"The race saved {100 * saved:.0f} % of the cost of training all arms to the end."]
    last = {arm.name: race["reached"][arm.name] for arm in out}
    for name, rungs in last.items():
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


def _facts(found):
    """Return (name, value) pairs on the first arm's training: checkpoint, device, data and package versions."""
    provenance = next((run["provenance"] for arm in found for run in arm.runs.values() if "provenance" in run), None)
    if provenance is None:
        return []
    prints = provenance["fingerprints"]
    rows = [("checkpoint", prints["weights"][:12]), ("device", provenance["device"])]
    rows += [(f"training data {name}", value[:12]) for name, value in prints["datasets"].items()]
    return [*rows, *provenance["versions"].items()]
