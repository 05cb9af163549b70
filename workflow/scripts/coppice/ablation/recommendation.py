"""What an ablation comes to: the best arm, the cheapest within its noise, or that no arm is clearly better."""

from . import formats, measuring
from .reading import LOSS

CLEAR, OPEN = "clear", "not clear"


def main_metric(arms):
    """The metric of the report by which arms are judged in a word: mean accuracy, else the first text's perplexity."""
    reported = [arm for arm in arms if arm.measured("report")]
    if not reported:
        return None
    result = reported[0].evaluations("report")[0]
    if result["average_acc"] is not None:
        return "average_acc"
    return next((f"ppl.{name}" for name in result["perplexity"]), None)


def recommend(arms, choose_by, reference):
    """{verdict, sentence, evidence} for arms that were trained alike, by the metric that ranks them.

    reference: the arm whose difference to the best is told in the report's metrics.
    """
    metric, lower = choose_by["metric"], choose_by["mode"] == "min"
    best = (min if lower else max)(arms, key=lambda arm: arm.value(metric))
    against = measuring.differences(arms, best, metric, "selection", lower)
    near = [arm for arm in arms if arm is best or against[arm.name]["verdict"] != "worse"]
    cheapest = min(near, key=lambda arm: (arm.first["trainable_parameters"], arm.first["seconds"]))
    told = f"{formats.label(metric, 'selection')} {formats.value(metric, best.value(metric))}"
    if len(near) == len(arms):
        sentence = f"No arm is clearly better. Take the cheapest, {cheapest.name}: {formats.trains(cheapest)}."
    elif cheapest is best:
        sentence = f"Take {best.name}: the best ({told}), and nothing cheaper is within its noise."
    else:
        sentence = (
            f"The best is {best.name} ({told}); the cheapest within its noise is {cheapest.name}, which "
            f"{formats.trains(cheapest)}, {formats.share_of(cheapest, best)} of the best's."
        )
    verdict = OPEN if len(near) == len(arms) else CLEAR
    told = [*_ranking(arms, best, against, metric), *_reported(arms, best, reference), *_first_in_report(arms, best)]
    evidence = [*told, *_seeds(arms)]
    return {"verdict": verdict, "sentence": sentence, "evidence": evidence}


def validated(start, combination):
    """The same for a staged ablation: the winners' combination against the start, on data that no stage has seen."""
    metric = main_metric([start, combination])
    lower = metric.startswith("ppl.")
    found = measuring.differences([start, combination], start, metric, "report", lower)[combination.name]
    told = formats.difference(metric, found)
    same = combination.settings == start.settings
    if same:
        sentence = "The stages chose the starting configuration: keep it."
    elif found["verdict"] == "better":
        sentence = f"Take the combination of the winners: {told} on data that no stage has seen."
    elif found["verdict"] == "worse":
        sentence = f"Keep the starting configuration: the combination is {told} on data that no stage has seen."
    else:
        cheaper = min(start, combination, key=lambda arm: arm.first["trainable_parameters"])
        sentence = (
            f"On data that no stage has seen the combination is not clearly better than the starting configuration "
            f"({told}); take {cheaper.name}, the cheaper of the two: it {formats.trains(cheaper)}."
        )
    verdict = OPEN if not same and found["verdict"] == "no clear change" else CLEAR
    evidence = [*_reported([start, combination], combination, start), *_seeds([start, combination])]
    return {"verdict": verdict, "sentence": sentence, "evidence": evidence}


def _ranking(arms, best, against, metric):
    """How far the others are from the best, in order."""
    lower = metric == LOSS or metric.startswith("ppl.")
    order = sorted(arms, key=lambda arm: arm.value(metric), reverse=not lower)
    for arm in order:
        if arm is not best:
            found = against[arm.name]
            sure = "clearly worse" if found["verdict"] == "worse" else "no clear difference"
            yield (
                f"{arm.name} against {best.name}: {formats.label(metric, 'selection')} "
                f"{formats.difference(metric, found)}, p = {found['p_holm']:.2g} (Holm): {sure}"
            )


def _first_in_report(arms, best):
    """Where another arm than the best is first in the report's main metric: which, and by how much."""
    metric = main_metric(arms)
    if metric is None or not all(arm.measured("report") for arm in arms):
        return
    lower = metric.startswith("ppl.")
    first = (min if lower else max)(arms, key=lambda arm: arm.value(metric, "report"))
    if first is not best:
        found = measuring.differences(arms, best, metric, "report", lower)[first.name]
        yield (
            f"In {formats.label(metric)} {first.name} is first, {formats.difference(metric, found)} from {best.name}, "
            f"p = {found['p_holm']:.2g} (Holm): {found['verdict']}"
        )


def _reported(arms, best, reference):
    """The difference of the best to the reference in every metric of the report."""
    if best is reference or not (best.measured("report") and reference.measured("report")):
        return
    for metric, lower in formats.metrics(best):
        compared = [arm for arm in arms if arm.measured("report")]
        found = measuring.differences(compared, reference, metric, "report", lower)[best.name]
        yield (
            f"{best.name} against {reference.name}, {formats.label(metric)}: {formats.difference(metric, found)}, "
            f"p = {found['p_holm']:.2g} (Holm): {found['verdict']}"
        )


def _seeds(arms):
    count = len(arms[0].runs)
    if count == 1:
        yield "One seed: what another seed would have done is not known."
    elif count == 2:
        yield "Two seeds: a difference counts only where both point the same way; an interval over them says little."
