"""Answer the study's five questions, each in a sentence computed from the data, with supporting numbers.

An answer is about the models of the study: its interval covers the items and texts that they were tested on. Whether
it holds for other models depends on how much the study's models agree, so each clear answer adds a permutation test
over models, and its verdict says which of the two it is about. If an interval contains zero, there is "not enough
evidence".

The study's leading metric decides the answers, and its other metrics support them (see `stats.metrics`).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from coppice.render import formatting
from coppice.stats import metrics, paired_stats
from coppice.stats.across_models import Means

from . import caveats, group_answers
from .evidence import (
    ABSENT,
    ALPHA,
    CLEAR,
    UNDECIDED,
    Answer,
    beyond,
    columns,
    complete,
    lost_of,
    not_applicable,
    once_per_candidate,
    other_shares,
    shares,
    undecided,
    usable,
)
from .measurements import Measurements
from .study_records import Pair, Study

Comparison = dict[str, Any]  # of two configs: {configs, metric, lead, ahead, models, lines}, and whether it is clear


def answers(study: Study, measurements: Measurements) -> list[Answer]:
    """Return the five `Answer`s of a `Study` with its `Measurements`, in the order of the questions.

    Studies of language models have all five. Others, and parts of a study that mixes models, have those that apply.
    """
    questions = (_start, _recovery, _tradeoff, group_answers.families, group_answers.variants)
    found = [answer(study, measurements) for answer in questions]
    leading, _ = study.axes
    if study.is_part or not leading.mean_of:
        found = [answer for answer in found if answer.verdict != ABSENT]
    return [replace(answer, warnings=caveats.warnings(study, measurements, answer)) for answer in found]


def _start(study: Study, measurements: Measurements) -> Answer:
    """Answer question 1: which config is the better start."""
    configs = study.configs
    if len(configs) < 2:
        why = f"The study has one config, {configs[0]}, so there is nothing to compare it with."
        return not_applicable("start", "Which config is the better start for fine-tuning?", why)
    question = f"Which is the better start for fine-tuning: {formatting.either(configs)}?"
    pairs = {(pair.model, pair.config): pair for pair in usable(study, measurements)}
    found = []
    for first, second in combinations(configs, 2):
        models = [name for name in study.models if (name, first) in pairs and (name, second) in pairs]
        same = [name for name in models if pairs[name, first].candidate == pairs[name, second].candidate]
        found.append(_two_starts(measurements, first, second, [name for name in models if name not in same], same))
    compared = [entry for entry in found if entry]
    if not compared:
        return undecided("start", question, "no model has results for two different candidates yet")
    for entry, p in zip(compared, paired_stats.holm([entry["lead"]["p"] for entry in compared]), strict=True):
        entry["clear"] = p < ALPHA
    closest = _closest_rival(compared)
    lines = closest["lines"] + [
        line for entry in compared if entry is not closest for line in (_start_sentence(entry), *entry["lines"])
    ]
    verdict = closest["verdict"] if closest["clear"] else UNDECIDED
    return Answer("start", question, verdict, _start_sentence(closest), lines)


def _closest_rival(compared: Sequence[Comparison]) -> Comparison:
    """Return the comparison of the best config (largest sum of leads) with its closest rival.

    This comparison decides the answer: a config is the best only if it is clearly ahead of every other one.
    """
    leads = {}
    for entry in compared:
        for config, sign in zip(entry["configs"], (1, -1), strict=True):
            leads[config] = leads.get(config, 0) + sign * entry["ahead"]
    best = max(leads, key=leads.get)
    return min((entry for entry in compared if best in entry["configs"]), key=lambda entry: abs(entry["ahead"]))


def _two_starts(
    measurements: Measurements, first: str, second: str, models: Sequence[str], same: Sequence[str]
) -> Comparison | None:
    """Compare two configs over `models`; return None if there are none.

    same: the models that are left out because both configs chose the same candidate.
    """
    if not models:
        return None
    (metric, means), share = measurements.leading, 1 / len(models)
    leads = {}
    for stage in ("pruned", "finetuned"):
        terms = {(name, first, stage): share for name in models} | {(name, second, stage): -share for name in models}
        leads[stage] = means.contrast(terms)
    sign = 1 if metric.higher_is_better else -1
    each = [means.contrast({(m, first, "finetuned"): sign, (m, second, "finetuned"): -sign})["value"] for m in models]
    lines = [
        f"After fine-tuning, {first} is ahead of {second} in {sum(value > 0 for value in each)} of "
        f"{formatting.count(len(models), 'model')}. Before fine-tuning, {first} was "
        f"{formatting.difference(metric, leads['pruned'])} {second}."
    ]
    if same:
        lines.append(f"Left out, because both configs chose the same candidate: {formatting.listed(same)}.")
    lines += _other_leads(measurements, first, second, models)
    verdict, line = beyond("differ", each)
    lines.append(line)
    lead = leads["finetuned"]
    entry = {"configs": (first, second), "metric": metric, "lead": lead, "ahead": sign * lead["value"]}
    entry["verdict"] = verdict  # if the lead is clear
    return entry | {"models": len(models), "lines": lines}


def _start_sentence(entry: Comparison) -> str:
    """Say which of two configs is ahead after fine-tuning, and by how much."""
    (first, second), metric = entry["configs"], entry["metric"]
    lead, over = entry["lead"], formatting.count(entry["models"], "model")
    if not entry["clear"]:
        return (
            f"Not enough evidence: after fine-tuning, {first} is {formatting.difference(metric, lead)} {second} in "
            f"{metric.spoken} over {over}, which is within the noise."
        )
    winner, loser = (first, second) if entry["ahead"] > 0 else (second, first)
    return (
        f"{winner} is a better start than {loser}: after fine-tuning, its {metric.spoken} over {over} is "
        f"{formatting.difference(metric, lead, size=True)} {'higher' if metric.higher_is_better else 'lower'}."
    )


def _other_leads(measurements: Measurements, first: str, second: str, models: Sequence[str]) -> list[str]:
    """Return one sentence for each other metric on how the two configs compare after fine-tuning."""
    lines = []
    for metric, means in measurements.others.items():
        found = [m for m in models if all((m, config, "finetuned") in means for config in (first, second))]
        if not found:
            continue
        terms = {(m, first, "finetuned"): 1 / len(found) for m in found}
        terms |= {(m, second, "finetuned"): -1 / len(found) for m in found}
        lead = formatting.compared(metric, means.contrast(terms))
        what = f"{metric.kind} of {first} on {metric.name}" if metric.name else f"{metric.spoken} of {first}"
        lines.append(f"After fine-tuning, the {what} is {lead} that of {second}.")
    return lines


def _recovery(study: Study, measurements: Measurements) -> Answer:
    """Answer question 2: how much fine-tuning recovers."""
    question = "How much of what pruning lost does LoRA fine-tuning recover?"
    pairs = once_per_candidate(usable(study, measurements))
    if not pairs:
        return _recovery_of_others(study, measurements, question)
    metric, means = measurements.leading
    gained, lost = shares(metric, pairs)
    ratio = means.ratio(gained, lost)
    cost = formatting.difference(metric, means.contrast({name: w / len(pairs) for name, w in lost.items()}), size=True)
    lines = [f"Pruning cost {cost} of {metric.spoken} on average over {formatting.pairs(pairs)}."]
    lines += _spread(metric, pairs) + _verdicts(metric, pairs)
    behind = {}
    for pair in pairs:
        dense, _, finetuned = columns(pair)
        behind[finetuned] = behind.get(finetuned, 0) + 1 / len(pairs)
        behind[dense] = behind.get(dense, 0) - 1 / len(pairs)
    apart = formatting.difference(metric, means.contrast(behind))
    lines.append(f"After fine-tuning, {metric.spoken} is {apart} that of the dense models.")
    lines += [line for _, line in other_shares(study, measurements)]
    if ratio["interval"] is None:
        lost_nothing = ratio["value"] is None
        why = f"pruning cost no {metric.spoken}" if lost_nothing else f"the lost {metric.spoken} is within the noise"
        return undecided("recovery", question, why, lines)
    low, _ = ratio["interval"]
    sentence = f"Fine-tuning recovers {formatting.share(ratio)} of the {metric.spoken} that pruning lost."
    if low <= 0 <= ratio["interval"][1]:
        sentence = (
            f"Not enough evidence that fine-tuning recovers {metric.spoken}: the recovered share is "
            f"{formatting.share(ratio)}."
        )
        return Answer("recovery", question, UNDECIDED, sentence, lines)
    verdict, line = beyond("change", _gains(metric, means, pairs))
    return Answer("recovery", question, verdict, sentence, [*lines, line])


def _gains(metric: metrics.Metric, means: Means, pairs: Sequence[Pair]) -> list[float]:
    """Return what fine-tuning gained in each model, on average over its pairs."""
    gains = {}
    for pair in pairs:
        gained, _ = shares(metric, [pair])
        gains.setdefault(pair.model, []).append(means.contrast(gained)["value"])
    return [sum(values) / len(values) for values in gains.values()]


def _recovery_of_others(study: Study, measurements: Measurements, question: str) -> Answer:
    """Answer question 2 from the other metrics, for a study without the leading one."""
    found = other_shares(study, measurements)
    if not found:
        return undecided("recovery", question, "no pair has been compared yet")
    verdict = CLEAR if any(ratio["interval"] and ratio["interval"][0] > 0 for ratio, _ in found) else UNDECIDED
    return Answer("recovery", question, verdict, " ".join(line for _, line in found))


def _spread(metric: metrics.Metric, pairs: Sequence[Pair]) -> list[str]:
    """Return sentences that name the pairs with the smallest and the largest recovered share."""
    defined = [(pair.measured(metric)["recovered"]["value"], pair) for pair in pairs]
    defined = sorted(((value, pair) for value, pair in defined if value is not None), key=lambda entry: entry[0])
    lines = []
    if len(defined) < len(pairs):
        lines.append(
            f"The recovered share is undefined for {formatting.count(len(pairs) - len(defined), 'pair')}, in which "
            "pruning lost nothing."
        )
    if len(defined) > 1:
        (low, least), (high, most) = defined[0], defined[-1]
        lines.append(
            f"The recovered share ranges from {formatting.percent(low)} ({formatting.name(least)}) "
            f"to {formatting.percent(high)} ({formatting.name(most)})."
        )
    return lines


def _verdicts(metric: metrics.Metric, pairs: Sequence[Pair]) -> list[str]:
    verdicts = [pair.measured(metric)["verdict"] for pair in pairs]
    better, worse, unclear = (verdicts.count(word) for word in ("better", "worse", "no clear change"))
    total = formatting.count(len(pairs), "pair")
    clauses = [f"clearly improves {metric.spoken} in {better} of {total}"]
    clauses += [f"clearly worsens it in {worse}"] if worse else []
    clauses += [f"makes no clear change in {unclear}"] if unclear else []
    return [f"Fine-tuning {formatting.listed(clauses)}."]


def _tradeoff(study: Study, measurements: Measurements) -> Answer:
    """Answer question 3: how the trade-off between the leading metric and the first other one moves."""
    both = metrics.axes(measurements.means)
    first, second = both
    question = f"How does the trade-off between {first.kind} and {second.kind} move?"
    pairs = once_per_candidate(complete(usable(study, measurements), measurements.means.get(second)))
    if not pairs:
        why = f"no pair has both {first.kind} and {second.kind} before and after fine-tuning"
        return undecided("tradeoff", question, why)
    means = [measurements.means[metric] for metric in both]
    recovered = [of.ratio(*shares(metric, pairs)) for metric, of in zip(both, means, strict=True)]
    lines = [_quadrants(both, pairs)]
    lines.append(formatting.exchange(*zip(both, means, strict=True), [columns(pair) for pair in pairs]))
    if any(ratio["interval"] is None for ratio in recovered):
        why = f"what pruning lost in {first.kind} or {second.kind} is within the noise"
        return undecided("tradeoff", question, why, lines)
    further: dict[str, list[float]] = {}
    for pair in pairs:
        by_first, by_second = (of.ratio(*shares(m, [pair]))["value"] for m, of in zip(both, means, strict=True))
        if None not in (by_first, by_second):
            further.setdefault(pair.model, []).append(by_second - by_first)
    leads = [lead for found in further.values() for lead in found]
    if leads:
        lines.append(
            f"{second.heading} recovers further than {first.kind} in {sum(lead > 0 for lead in leads)} of "
            f"{formatting.count(len(leads), 'pair')}."
        )
    # The two shares come from different data sets, so their errors are independent.
    apart = paired_stats.apart(recovered[1], recovered[0])
    more, less = (second.kind, first.kind) if apart["value"] > 0 else (first.kind, second.kind)
    place = f" on {second.name}" if second.name else ""
    facts = (
        f"fine-tuning recovers {formatting.share(recovered[1])} of the lost {lost_of(second)}{place} and "
        f"{formatting.share(recovered[0])} of the lost {lost_of(first)}"
    )
    if apart["p"] < ALPHA:
        sentence = f"It moves towards {more}: {facts}, so {more} recovers further than {less}."
        verdict, line = beyond("differ", [sum(found) / len(found) for found in further.values()])
        return Answer("tradeoff", question, verdict, sentence, [*lines, line])
    sentence = f"Not enough evidence that it moves: {facts}, and the difference is within the noise."
    return Answer("tradeoff", question, UNDECIDED, sentence, lines)


def _quadrants(both: tuple[metrics.Metric, metrics.Metric], pairs: Sequence[Pair]) -> str:
    """Count the pairs in which both metrics got clearly better, and those in which one got better and one worse."""
    words = [[pair.measured(metric)["verdict"] for metric in both] for pair in pairs]
    improved = words.count(["better", "better"])
    traded = sum(set(pair) == {"better", "worse"} for pair in words)
    first, second = both
    return (
        f"Fine-tuning clearly improves both {first.kind} and {second.kind} in {improved} of "
        f"{formatting.count(len(pairs), 'pair')}, and clearly improves one but worsens the other in {traded}."
    )
