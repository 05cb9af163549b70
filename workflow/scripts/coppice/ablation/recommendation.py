"""Recommend an arm: the best one, the cheapest one within noise of it, or, if none is clearly better, the cheapest."""

from collections.abc import Iterator, Mapping, Sequence

from coppice.core.aliases import Estimate
from coppice.stats.metrics import Metric
from coppice.study.settings.sections.ablation import ChooseBy

from . import formats, measuring
from .reading import Arm, ranking_metric

CLEAR, OPEN = "clear", "not clear"


def main_metric(arms: Sequence[Arm]) -> Metric | None:
    """Return the main metric of the report: the first that reports show for every pair of a study, or None."""
    measured = next((arm for arm in arms if arm.measured("report")), None)
    return next((metric for metric in formats.metrics(measured) if metric.reported), None) if measured else None


def recommend(arms: Sequence[Arm], choose_by: ChooseBy, reference: Arm) -> dict:
    """Return {verdict, sentence, evidence}: which of several comparable arms to take.

    choose_by: how the arms are ranked; reference: the arm that the best one is compared with in the
    metrics of the report.
    """
    metric = ranking_metric(choose_by)
    best = _best(arms, metric, "selection")
    against = measuring.differences(arms, best, metric, "selection")
    near = [arm for arm in arms if arm is best or against[arm.name]["verdict"] != "worse"]
    cheapest = min(near, key=lambda arm: (arm.first["trainable_parameters"], arm.first["seconds"]))
    level = f"{formats.label(metric, 'selection')} {formats.value(metric, best.value(metric))}"
    if len(near) == len(arms):
        sentence = f"No arm is clearly better. Take the cheapest, {cheapest.name}, which {formats.trains(cheapest)}."
    elif cheapest is best:
        sentence = f"Take {best.name}: it is the best ({level}), and no cheaper arm is within noise of it."
    else:
        sentence = (
            f"{best.name} is the best ({level}). The cheapest arm within noise of it is {cheapest.name}, which "
            f"{formats.trains(cheapest)}, {formats.share_of(cheapest, best)} of what {best.name} trains."
        )
    verdict = OPEN if len(near) == len(arms) else CLEAR
    evidence = [*_ranking(arms, best, against, metric), *_reported(arms, best, reference)]
    evidence += [*_first_in_report(arms, best), *_seeds(arms)]
    return {"verdict": verdict, "sentence": sentence, "evidence": evidence}


def validated(start: Arm, combination: Arm) -> dict:
    """Return the same for a staged ablation: whether the combined winners beat the start on data no stage has used."""
    metric = main_metric([start, combination])
    found = measuring.differences([start, combination], start, metric, "report")[combination.name]
    change = f"{formats.label(metric)} by {formats.difference(metric, found)}"
    same = combination.settings == start.settings
    if same:
        sentence = "The stages chose the starting configuration: keep it."
    elif found["verdict"] == "better":
        sentence = f"Take the combination of the winners: it changes {change} on data that no stage has seen."
    elif found["verdict"] == "worse":
        sentence = (
            f"Keep the starting configuration: the combination of the winners changes {change} on data that no stage "
            "has seen."
        )
    else:
        cheaper = min(start, combination, key=lambda arm: arm.first["trainable_parameters"])
        sentence = (
            "The combination of the winners is not clearly better than the starting configuration: it changes "
            f"{change} on data that no stage has seen. Take {cheaper.name}, the cheaper of the two, which "
            f"{formats.trains(cheaper)}."
        )
    verdict = OPEN if not same and found["verdict"] == "no clear change" else CLEAR
    evidence = [*_reported([start, combination], combination, start), *_seeds([start, combination])]
    return {"verdict": verdict, "sentence": sentence, "evidence": evidence}


def _best(arms: Sequence[Arm], metric: Metric, part: str) -> Arm:
    return (max if metric.higher_is_better else min)(arms, key=lambda arm: arm.value(metric, part))


def _ranking(arms: Sequence[Arm], best: Arm, against: Mapping[str, Estimate], metric: Metric) -> Iterator[str]:
    """Yield how far each other arm is from the best one, in order of rank."""
    order = sorted(arms, key=lambda arm: arm.value(metric), reverse=metric.higher_is_better)
    for arm in order:
        if arm is not best:
            found = against[arm.name]
            verdict = "clearly worse" if found["verdict"] == "worse" else "no clear difference"
            yield (
                f"{arm.name} against {best.name}, {formats.label(metric, 'selection')}: "
                f"{formats.difference(metric, found)}, p = {found['p_holm']:.2g} (Holm): {verdict}"
            )


def _first_in_report(arms: Sequence[Arm], best: Arm) -> Iterator[str]:
    """Yield which arm leads in the report's main metric, and by how much, if it is not the best one."""
    metric = main_metric(arms)
    if metric is None or not all(arm.measured("report") for arm in arms):
        return
    first = _best(arms, metric, "report")
    if first is not best:
        found = measuring.differences(arms, best, metric, "report")[first.name]
        yield (
            f"{first.name} leads in {formats.label(metric)}: {formats.difference(metric, found)} against {best.name}, "
            f"p = {found['p_holm']:.2g} (Holm): {found['verdict']}"
        )


def _reported(arms: Sequence[Arm], best: Arm, reference: Arm) -> Iterator[str]:
    """Yield the difference between the best arm and the reference in every metric of the report."""
    if best is reference or not (best.measured("report") and reference.measured("report")):
        return
    for metric in formats.metrics(best):
        compared = [arm for arm in arms if arm.measured("report")]
        found = measuring.differences(compared, reference, metric, "report")[best.name]
        yield (
            f"{best.name} against {reference.name}, {formats.label(metric)}: {formats.difference(metric, found)}, "
            f"p = {found['p_holm']:.2g} (Holm): {found['verdict']}"
        )


def _seeds(arms: Sequence[Arm]) -> Iterator[str]:
    count = len(arms[0].runs)
    if count == 1:
        yield "One seed only: how much the results vary between seeds is unknown."
    elif count == 2:
        yield "Two seeds only: a difference counts if both agree on its sign; an interval over two says little."
