"""Answer the study's five questions, each in a sentence computed from the data, with supporting numbers.

An answer is about the models of the study: its interval covers the items that they were tested on. Whether it holds
for other models (of a family, other instruct models) depends on how much the study's models agree, so answers that
compare groups add a permutation test over models. If an interval contains zero, there is "not enough evidence".
"""

from dataclasses import dataclass, field
from itertools import combinations

from coppice.render import formatting
from coppice.stats import paired_stats
from coppice.stats.paired_stats import LEVEL

from .measurements import column
from .study_records import family_of

UNDECIDED = "not enough evidence"
CLEAR = "clear"
ABSENT = "not applicable"
ALPHA = 1 - LEVEL
NAMED = 3  # an answer spells out at most this many differences between groups


@dataclass
class Answer:
    """One answer; `verdict` is `CLEAR`, `UNDECIDED` or `ABSENT`, `support` holds sentences with further numbers."""

    key: str
    question: str
    verdict: str
    sentence: str
    support: list = field(default_factory=list)


def answers(study, measurements):
    """Return the five `Answer`s of a `Study` with its `Measurements`, in the order of the questions."""
    return [answer(study, measurements) for answer in (_start, _recovery, _tradeoff, _families, _variants)]


def usable(study, measurements):
    """Return the compared pairs whose items are complete at all three stages."""
    means = measurements.accuracy
    return [pair for pair in study.compared if means is not None and all(name in means for name in _columns(pair))]


def _columns(pair):
    return [column(pair.model, pair.config, stage) for stage in ("dense", "pruned", "finetuned")]


def shares(pairs):
    """Return (finetuned - pruned, dense - pruned) summed over `pairs`, as column -> weight for `Means.ratio`."""
    gained, lost = {}, {}
    for pair in pairs:
        dense, pruned, finetuned = _columns(pair)
        for terms, plus, minus in ((gained, finetuned, pruned), (lost, dense, pruned)):
            terms[plus] = terms.get(plus, 0) + 1
            terms[minus] = terms.get(minus, 0) - 1
    return gained, lost


def _negated(shares_):
    """Return `shares` for a loss, where lower is better."""
    return tuple({name: -weight for name, weight in terms.items()} for terms in shares_)


def _not_applicable(key, question, why):
    return Answer(key, question, ABSENT, why)


def _undecided(key, question, why, lines=()):
    return Answer(key, question, UNDECIDED, f"Not enough evidence: {why}.", list(lines))


def _start(study, measurements):
    """Answer question 1: which config is the better start."""
    configs = study.configs
    if len(configs) < 2:
        why = f"The study has one config, {configs[0]}, so there is nothing to compare it with."
        return _not_applicable("start", "Which config is the better start for fine-tuning?", why)
    question = f"Which is the better start for fine-tuning: {formatting.either(configs)}?"
    pairs = {(pair.model, pair.config): pair for pair in usable(study, measurements)}
    compared = []
    for first, second in combinations(configs, 2):
        models = [name for name in study.models if (name, first) in pairs and (name, second) in pairs]
        same = [name for name in models if pairs[name, first].candidate == pairs[name, second].candidate]
        compared.append(_two_starts(measurements, first, second, [name for name in models if name not in same], same))
    compared = [entry for entry in compared if entry]
    if not compared:
        return _undecided("start", question, "no model has results for two different candidates yet")
    for entry, p in zip(compared, paired_stats.holm([entry["lead"]["p"] for entry in compared]), strict=True):
        entry["clear"] = p < ALPHA
    closest = _closest_rival(compared)
    lines = closest["lines"] + [
        line for entry in compared if entry is not closest for line in (_start_sentence(entry), *entry["lines"])
    ]
    return Answer("start", question, CLEAR if closest["clear"] else UNDECIDED, _start_sentence(closest), lines)


def _closest_rival(compared):
    """Return the comparison of the best config (largest sum of leads) with its closest rival.

    This comparison decides the answer: a config is the best only if it is clearly ahead of every other one.
    """
    leads = {}
    for entry in compared:
        for config, sign in zip(entry["configs"], (1, -1), strict=True):
            leads[config] = leads.get(config, 0) + sign * entry["lead"]["value"]
    best = max(leads, key=leads.get)
    return min((entry for entry in compared if best in entry["configs"]), key=lambda entry: abs(entry["lead"]["value"]))


def _two_starts(measurements, first, second, models, same):
    """Compare two configs over `models`; return None if there are none.

    same: the models that are left out because both configs chose the same candidate.
    """
    if not models:
        return None
    means, share = measurements.accuracy, 1 / len(models)
    leads = {}
    for stage in ("pruned", "finetuned"):
        terms = {(name, first, stage): share for name in models} | {(name, second, stage): -share for name in models}
        leads[stage] = means.contrast(terms)
    each = [means.contrast({(m, first, "finetuned"): 1, (m, second, "finetuned"): -1})["value"] for m in models]
    lines = [
        f"After fine-tuning, {first} is ahead of {second} in {sum(value > 0 for value in each)} of "
        f"{formatting.count(len(models), 'model')}. Before fine-tuning, {first} was "
        f"{formatting.points(leads['pruned'])} {second}."
    ]
    if same:
        lines.append(f"Left out, because both configs chose the same candidate: {formatting.listed(same)}.")
    lines += _text_leads(measurements, first, second, models)
    lines.append(formatting.beyond(paired_stats.sign_flip(each), "models"))
    return {"configs": (first, second), "lead": leads["finetuned"], "models": len(models), "lines": lines}


def _start_sentence(entry):
    """Say which of two configs is ahead after fine-tuning, and by how much."""
    first, second = entry["configs"]
    lead, over = entry["lead"], formatting.count(entry["models"], "model")
    if not entry["clear"]:
        return (
            f"Not enough evidence: after fine-tuning, {first} is {formatting.points(lead)} {second} in mean accuracy "
            f"over {over}, which is within the noise."
        )
    winner, loser = (first, second) if lead["value"] > 0 else (second, first)
    return (
        f"{winner} is a better start than {loser}: after fine-tuning, its mean accuracy over {over} is "
        f"{formatting.points(lead, size=True)} higher."
    )


def _text_leads(measurements, first, second, models):
    """Return one sentence per text with the ratio of the two configs' perplexities after fine-tuning."""
    lines = []
    for text, losses in measurements.losses.items():
        named = [m for m in models if all((m, config, "finetuned") in losses for config in (first, second))]
        if not named:
            continue
        terms = {(m, first, "finetuned"): 1 / len(named) for m in named}
        terms |= {(m, second, "finetuned"): -1 / len(named) for m in named}
        lead = losses.contrast(terms)
        lines.append(
            f"After fine-tuning, the perplexity of {first} on {text} is {formatting.times(lead)} that of {second}."
        )
    return lines


def _recovery(study, measurements):
    """Answer question 2: how much fine-tuning recovers."""
    question = "How much of what pruning lost does LoRA fine-tuning recover?"
    pairs = usable(study, measurements)
    if not pairs:
        return _recovery_by_text(study, measurements, question)
    means = measurements.accuracy
    gained, lost = shares(pairs)
    ratio = means.ratio(gained, lost)
    loss = means.contrast({name: weight / len(pairs) for name, weight in lost.items()})
    lines = [
        f"Pruning cost {formatting.points(loss, size=True)} of mean accuracy on average over {formatting.pairs(pairs)}."
    ]
    lines += _spread(pairs) + _verdicts(pairs)
    behind = {}
    for pair in pairs:
        dense, _, finetuned = _columns(pair)
        behind[finetuned] = behind.get(finetuned, 0) + 1 / len(pairs)
        behind[dense] = behind.get(dense, 0) - 1 / len(pairs)
    lines.append(
        f"After fine-tuning, mean accuracy is {formatting.points(means.contrast(behind))} that of the dense models."
    )
    lines += [line for _, line in text_shares(study, measurements)]
    if ratio["interval"] is None:
        lost_nothing = ratio["value"] is None
        why = "pruning cost no mean accuracy" if lost_nothing else "the lost mean accuracy is within the noise"
        return _undecided("recovery", question, why, lines)
    low, _ = ratio["interval"]
    sentence = f"Fine-tuning recovers {formatting.share(ratio)} of the mean accuracy that pruning lost."
    if low <= 0 <= ratio["interval"][1]:
        sentence = (
            "Not enough evidence that fine-tuning recovers mean accuracy: the recovered share is "
            f"{formatting.share(ratio)}."
        )
        return Answer("recovery", question, UNDECIDED, sentence, lines)
    return Answer("recovery", question, CLEAR, sentence, lines)


def _recovery_by_text(study, measurements, question):
    """Answer question 2 from perplexity alone, for a study without zero-shot tasks."""
    found = text_shares(study, measurements)
    if not found:
        return _undecided("recovery", question, "no pair has been compared yet")
    verdict = CLEAR if any(ratio["interval"] and ratio["interval"][0] > 0 for ratio, _ in found) else UNDECIDED
    return Answer("recovery", question, verdict, " ".join(line for _, line in found))


def text_shares(study, measurements):
    """Return [(ratio, sentence)] per text: the recovered share of the lost log-perplexity, over all pairs."""
    found = []
    for text, losses in measurements.losses.items():
        pairs = [pair for pair in study.compared if all(name in losses for name in _columns(pair))]
        if pairs:
            ratio = losses.ratio(*_negated(shares(pairs)))
            found.append((ratio, f"On {text}, the recovered share of log-perplexity is {_share(ratio)}."))
    return found


def _spread(pairs):
    """Return sentences that name the pairs with the smallest and the largest recovered share."""
    defined = [(pair.comparison["average_acc"]["recovered"]["value"], pair) for pair in pairs]
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


def _verdicts(pairs):
    verdicts = [pair.comparison["average_acc"]["verdict"] for pair in pairs]
    better, worse, unclear = (verdicts.count(word) for word in ("better", "worse", "no clear change"))
    total = formatting.count(len(pairs), "pair")
    clauses = [f"clearly improves mean accuracy in {better} of {total}"]
    clauses += [f"clearly worsens it in {worse}"] if worse else []
    clauses += [f"makes no clear change in {unclear}"] if unclear else []
    return [f"Fine-tuning {formatting.listed(clauses)}."]


def _share(ratio):
    """Return a recovered share as text, with the reason if it is undefined."""
    return "undefined, because pruning lost nothing" if ratio["value"] is None else formatting.share(ratio)


def _tradeoff(study, measurements):
    """Answer question 3: how the trade-off between accuracy and perplexity moves."""
    question = "How does the trade-off between accuracy and perplexity move?"
    text = next(iter(measurements.losses), None)
    losses = measurements.losses.get(text)
    pairs = [
        p for p in usable(study, measurements) if losses is not None and all(name in losses for name in _columns(p))
    ]
    if not pairs:
        why = "no pair has both accuracy and perplexity before and after fine-tuning"
        return _undecided("tradeoff", question, why)
    accuracy, loss = measurements.accuracy.ratio(*shares(pairs)), losses.ratio(*_negated(shares(pairs)))
    lines = [_quadrants(pairs, text)]
    lines += [formatting.exchange(measurements.accuracy, losses, text, [_columns(pair) for pair in pairs])]
    if accuracy["interval"] is None or loss["interval"] is None:
        why = "what pruning lost in accuracy or perplexity is within the noise"
        return _undecided("tradeoff", question, why, lines)
    # The two shares come from different data sets, so their errors are independent.
    apart = paired_stats.apart(loss, accuracy)
    each = [
        (
            formatting.ratio_of(losses, *_negated(shares([pair]))),
            formatting.ratio_of(measurements.accuracy, *shares([pair])),
        )
        for pair in pairs
    ]
    both = [by_text - by_task for by_text, by_task in each if by_text is not None and by_task is not None]
    if both:
        further = sum(value > 0 for value in both)
        lines.append(
            f"Perplexity recovers further than accuracy in {further} of {formatting.count(len(both), 'pair')}."
        )
    clear = apart["p"] < ALPHA
    more, less = ("perplexity", "accuracy") if apart["value"] > 0 else ("accuracy", "perplexity")
    facts = (
        f"fine-tuning recovers {formatting.share(loss)} of the lost log-perplexity on {text} and "
        f"{formatting.share(accuracy)} of the lost accuracy"
    )
    sentence = f"Not enough evidence that it moves: {facts}, and the difference is within the noise."
    if clear:
        sentence = f"It moves towards {more}: {facts}, so {more} recovers further than {less}."
    return Answer("tradeoff", question, CLEAR if clear else UNDECIDED, sentence, lines)


def _quadrants(pairs, text):
    """Count the pairs in which both metrics got clearly better, and those in which one got better and one worse."""
    words = [(p.comparison["average_acc"]["verdict"], p.comparison["perplexity"][text]["verdict"]) for p in pairs]
    both = words.count(("better", "better"))
    traded = sum(set(pair) == {"better", "worse"} for pair in words)
    return (
        f"Fine-tuning clearly improves both accuracy and perplexity in {both} of "
        f"{formatting.count(len(pairs), 'pair')}, and clearly improves one but worsens the other in {traded}."
    )


def _families(study, measurements):
    """Answer question 4: whether architectures differ."""
    question = "Do architectures differ in how much they recover?"
    groups = {}
    for pair in usable(study, measurements):
        family = study.models[pair.model]["family"]
        if family:
            groups.setdefault(family, []).append(pair)
    if len({facts["family"] for facts in study.models.values() if facts["family"]}) < 2:
        return _not_applicable("families", question, "The study has fewer than two architectures to compare.")
    if len(groups) < 2:
        return _undecided("families", question, "fewer than two architectures have results yet")
    return _groups_differ("families", question, measurements.accuracy, groups)


def _groups_differ(key, question, means, groups):
    """Answer whether recovered shares differ between any two of `groups` (name -> pairs), with Holm's correction."""
    ratios = {name: means.ratio(*shares(pairs)) for name, pairs in groups.items()}
    lines = [
        f"{name}: the recovered share is {_share(ratio)} ({formatting.pairs(groups[name])})."
        for name, ratio in ratios.items()
    ]
    tests = []
    for first, second in combinations(groups, 2):
        found = means.ratio_difference(shares(groups[first]), shares(groups[second]))
        if found and found["p"] is not None:
            tests.append((first, second, found))
    by_model = [formatting.by_model(means, pairs, shares) for pairs in groups.values()]
    lines.append(formatting.beyond(paired_stats.groups_differ(by_model), "models in a group"))
    corrected = paired_stats.holm([found["p"] for *_, found in tests])
    clear = [test for test, p in zip(tests, corrected, strict=True) if p < ALPHA]
    if not clear:
        why = "pruning lost more than noise in fewer than two groups"
        if tests:
            why = f"the recovered shares ({formatting.ratios(ratios)}) differ by no more than noise"
        return _undecided(key, question, why, lines)
    if len(clear) > NAMED:
        order = sorted(ratios, key=lambda name: ratios[name]["value"])
        least, most = (f"{formatting.share(ratios[name])} ({name})" for name in (order[0], order[-1]))
        sentence = (
            f"Yes, in these models: {len(clear)} of {len(tests)} pairs of groups differ, with recovered shares from "
            f"{least} to {most}."
        )
        return Answer(key, question, CLEAR, sentence, lines)
    named = []
    for first, second, found in clear:
        more, less = (first, second) if found["value"] > 0 else (second, first)
        named.append(f"{more} recovers {formatting.share_points(found)} more than {less}")
    return Answer(key, question, CLEAR, f"Yes, in these models: {formatting.listed(named)}.", lines)


def _variants(study, measurements):
    """Answer question 5: whether instruct and base models differ, over the models whose partner is in the study."""
    question = "Do instruct and base models differ in how much they recover?"
    partners = _partners(study)
    if not partners:
        return _not_applicable("variants", question, "The study has no base model together with its instruct partner.")
    pairs = {(pair.model, pair.config): pair for pair in usable(study, measurements)}
    groups = {"instruct": [], "base": []}
    for base, instruct in partners:
        for config in study.configs:
            if (base, config) in pairs and (instruct, config) in pairs:
                groups["base"].append(pairs[base, config])
                groups["instruct"].append(pairs[instruct, config])
    if not groups["base"]:
        return _undecided("variants", question, "no base model and its instruct partner both have results yet")
    return _groups_differ("variants", question, measurements.accuracy, groups)


def _partners(study):
    """Return [(base model, instruct model)]: models of one family whose names match but for the instruct suffix.

    If no names match, a family's only base model and its only instruct model are partners.
    """
    families = {}
    for name, facts in study.models.items():
        if facts["family"] and facts["variant"]:
            families.setdefault(facts["family"], {"base": [], "instruct": []})[facts["variant"]].append(name)
    found = []
    for variants in families.values():
        bases, tuned = variants["base"], variants["instruct"]
        named = [(base, other) for base in bases for other in tuned if family_of(other) == base.lower()]
        found += named or ([(bases[0], tuned[0])] if len(bases) == len(tuned) == 1 else [])
    return found
