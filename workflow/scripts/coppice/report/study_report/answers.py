"""The five questions of the study, each answered in a sentence that is computed from the data, with its evidence.

An answer speaks of the models of the study: its interval is that of the items they were tested on. What may be said
beyond them (other models of a family, other instruct models) rests on how much the models agree among themselves, and
is given beside it, from a permutation test over models. Where an interval holds zero, the answer is that there is not
enough evidence.
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
ABSENT = "not asked"
ALPHA = 1 - LEVEL
NAMED = 3


@dataclass
class Answer:
    """One question: its short `key`, the answer's sentence, `verdict` (clear, not enough evidence, not asked)."""

    key: str
    question: str
    verdict: str
    sentence: str
    evidence: list = field(default_factory=list)


def answers(study, evidence):
    """The Answers of `study` to the five questions, in their order."""
    return [
        _start(study, evidence),
        _recovery(study, evidence),
        _tradeoff(study, evidence),
        _families(study, evidence),
        _variants(study, evidence),
    ]


def usable(study, evidence):
    """The compared pairs whose items are all there."""
    means = evidence.accuracy
    return [pair for pair in study.compared if means is not None and all(name in means for name in _columns(pair))]


def _columns(pair):
    return [column(pair.model, pair.config, stage) for stage in ("dense", "pruned", "finetuned")]


def shares(pairs):
    """(what came back, what was lost) summed over `pairs`, as linear combinations for `Means.ratio`."""
    gained, lost = {}, {}
    for pair in pairs:
        dense, pruned, finetuned = _columns(pair)
        for terms, plus, minus in ((gained, finetuned, pruned), (lost, dense, pruned)):
            terms[plus] = terms.get(plus, 0) + 1
            terms[minus] = terms.get(minus, 0) - 1
    return gained, lost


def _negated(shares_):
    return tuple({name: -weight for name, weight in terms.items()} for terms in shares_)


def _absent(key, question, why):
    return Answer(key, question, ABSENT, why)


def _start(study, evidence):
    """Question 1: which config is the better start."""
    configs = study.configs
    question = f"Which is the better start for fine-tuning: {formatting.either(configs)}?"
    if len(configs) < 2:
        question = "Which config is the better start for fine-tuning?"
    if len(configs) < 2:
        return _absent(
            "start", question, f"The study has one config, {configs[0]}: there is nothing to compare it with."
        )
    pairs = {(pair.model, pair.config): pair for pair in usable(study, evidence)}
    compared = []
    for first, second in combinations(configs, 2):
        models = [name for name in study.models if (name, first) in pairs and (name, second) in pairs]
        same = [name for name in models if pairs[name, first].candidate == pairs[name, second].candidate]
        compared.append(_two_starts(evidence, first, second, [name for name in models if name not in same], same))
    compared = [entry for entry in compared if entry]
    if not compared:
        return Answer(
            "start", question, UNDECIDED, "Not enough evidence: no model has two different starts measured by now."
        )
    for entry, p in zip(compared, paired_stats.holm([entry["lead"]["p"] for entry in compared]), strict=True):
        entry["clear"] = p < ALPHA
    closest = _closest_rival(compared)
    lines = closest["lines"] + [
        line for entry in compared if entry is not closest for line in (_start_sentence(entry), *entry["lines"])
    ]
    return Answer("start", question, CLEAR if closest["clear"] else UNDECIDED, _start_sentence(closest), lines)


def _closest_rival(compared):
    """Of the comparisons that the best config takes part in, the one with the smallest lead."""
    leads = {}
    for entry in compared:
        for config, sign in zip(entry["configs"], (1, -1), strict=True):
            leads[config] = leads.get(config, 0) + sign * entry["lead"]["value"]
    best = max(leads, key=leads.get)
    return min((entry for entry in compared if best in entry["configs"]), key=lambda entry: abs(entry["lead"]["value"]))


def _two_starts(evidence, first, second, models, same):
    """Two configs over the models for which they chose different candidates; None where there is no such model."""
    if not models:
        return None
    means, share = evidence.accuracy, 1 / len(models)
    leads = {}
    for stage in ("pruned", "finetuned"):
        terms = {(name, first, stage): share for name in models} | {(name, second, stage): -share for name in models}
        leads[stage] = means.contrast(terms)
    each = [means.contrast({(m, first, "finetuned"): 1, (m, second, "finetuned"): -1})["value"] for m in models]
    lines = [
        f"{first} ends ahead of {second} in {sum(value > 0 for value in each)} of "
        f"{formatting.count(len(models), 'model')}; before fine-tuning it was "
        f"{formatting.points(leads['pruned'])} {second}."
    ]
    if same:
        lines.append(f"They chose the same candidate for {formatting.listed(same)}: no difference there.")
    lines += _text_leads(evidence, first, second, models)
    lines.append(formatting.beyond(paired_stats.sign_flip(each), "models"))
    return {"configs": (first, second), "lead": leads["finetuned"], "models": len(models), "lines": lines}


def _start_sentence(entry):
    """Which of two configs is ahead after fine-tuning, and by how much."""
    first, second = entry["configs"]
    lead, over = entry["lead"], formatting.count(entry["models"], "model")
    if not entry["clear"]:
        return (
            f"Not enough evidence: after fine-tuning, {first} and {second} differ by "
            f"{formatting.points(lead, signed=True)} of mean accuracy over {over}, which is within noise."
        )
    winner, loser = (first, second) if lead["value"] > 0 else (second, first)
    return (
        f"{winner} is the better start: after fine-tuning its mean accuracy is {formatting.points(lead, size=True)} "
        f"above that of {loser}, over {over}."
    )


def _text_leads(evidence, first, second, models):
    """How the two configs' perplexities compare after fine-tuning, as a ratio, for each text."""
    lines = []
    for text, losses in evidence.losses.items():
        named = [m for m in models if all((m, config, "finetuned") in losses for config in (first, second))]
        if not named:
            continue
        terms = {(m, first, "finetuned"): 1 / len(named) for m in named}
        terms |= {(m, second, "finetuned"): -1 / len(named) for m in named}
        lead = losses.contrast(terms)
        lines.append(f"After fine-tuning, {first} has {formatting.times(lead)} the perplexity of {second} on {text}.")
    return lines


def _recovery(study, evidence):
    """Question 2: how much comes back."""
    question = "How much of what pruning lost does LoRA fine-tuning recover?"
    pairs = usable(study, evidence)
    if not pairs:
        return _recovery_by_text(study, evidence, question)
    means = evidence.accuracy
    gained, lost = shares(pairs)
    ratio = means.ratio(gained, lost)
    loss = means.contrast({name: weight / len(pairs) for name, weight in lost.items()})
    lines = [f"Pruning cost {formatting.points(loss, size=True)} of mean accuracy, over {formatting.pairs(pairs)}."]
    lines += _spread(pairs) + _verdicts(pairs)
    below = {}
    for pair in pairs:
        dense, _, finetuned = _columns(pair)
        below[finetuned] = below.get(finetuned, 0) + 1 / len(pairs)
        below[dense] = below.get(dense, 0) - 1 / len(pairs)
    lines.append(f"After fine-tuning the models stand {formatting.points(means.contrast(below))} the dense ones.")
    lines += [line for _, line in text_shares(study, evidence)]
    if ratio["interval"] is None:
        why = "pruning lost nothing" if ratio["value"] is None else "what pruning lost is within noise"
        return Answer("recovery", question, UNDECIDED, f"Not enough evidence: {why} in mean accuracy.", lines)
    low, _ = ratio["interval"]
    sentence = f"Fine-tuning brings back {formatting.share(ratio)} of the mean accuracy that pruning lost."
    if low <= 0 <= ratio["interval"][1]:
        sentence = (
            f"Not enough evidence that anything comes back in mean accuracy: {formatting.share(ratio)} of the loss."
        )
        return Answer("recovery", question, UNDECIDED, sentence, lines)
    return Answer("recovery", question, CLEAR, sentence, lines)


def _recovery_by_text(study, evidence, question):
    """The same where no task was scored: from perplexity alone."""
    found = text_shares(study, evidence)
    if not found:
        return Answer("recovery", question, UNDECIDED, "Not enough evidence: no pair was compared by now.")
    verdict = CLEAR if any(ratio["interval"] and ratio["interval"][0] > 0 for ratio, _ in found) else UNDECIDED
    return Answer("recovery", question, verdict, " ".join(line for _, line in found))


def text_shares(study, evidence):
    """[(ratio, sentence)] for each text: the share of the lost log-perplexity that came back, over all pairs."""
    found = []
    for text, losses in evidence.losses.items():
        pairs = [pair for pair in study.compared if all(name in losses for name in _columns(pair))]
        if pairs:
            ratio = losses.ratio(*_negated(shares(pairs)))
            found.append((ratio, f"Of the loss in nats a token on {text}, {formatting.share(ratio)} came back."))
    return found


def _spread(pairs):
    """From which pair least comes back, and from which most."""
    known = [(pair.comparison["average_acc"]["recovered"]["value"], pair) for pair in pairs]
    known = sorted(((value, pair) for value, pair in known if value is not None), key=lambda entry: entry[0])
    lines = []
    if len(known) < len(pairs):
        lines.append(
            f"Undefined for {formatting.count(len(pairs) - len(known), 'pair')}, in which pruning lost nothing."
        )
    if len(known) > 1:
        (low, least), (high, most) = known[0], known[-1]
        lines.append(
            f"From {formatting.percent(low)} ({formatting.name(least)}) "
            f"to {formatting.percent(high)} ({formatting.name(most)})."
        )
    return lines


def _verdicts(pairs):
    verdicts = [pair.comparison["average_acc"]["verdict"] for pair in pairs]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("better", "worse", "no clear change"))
    return [f"Mean accuracy after fine-tuning, pair by pair: {counts}."]


def _tradeoff(study, evidence):
    """Question 3: how accuracy and perplexity move against each other."""
    question = "How does the trade-off between accuracy and perplexity move?"
    text = next(iter(evidence.losses), None)
    losses = evidence.losses.get(text)
    pairs = [p for p in usable(study, evidence) if losses is not None and all(name in losses for name in _columns(p))]
    if not pairs:
        why = "Not enough evidence: no pair has both accuracy and perplexity, before and after."
        return Answer("tradeoff", question, UNDECIDED, why)
    accuracy, loss = evidence.accuracy.ratio(*shares(pairs)), losses.ratio(*_negated(shares(pairs)))
    lines = [_quadrants(pairs, text)]
    lines += [formatting.exchange(evidence.accuracy, losses, text, [_columns(pair) for pair in pairs])]
    if accuracy["interval"] is None or loss["interval"] is None:
        return Answer("tradeoff", question, UNDECIDED, "Not enough evidence: what pruning lost is within noise.", lines)
    # two data sets, so the errors of the two shares are independent
    apart = paired_stats.apart(loss, accuracy)
    each = [
        (
            formatting.ratio_of(losses, *_negated(shares([pair]))),
            formatting.ratio_of(evidence.accuracy, *shares([pair])),
        )
        for pair in pairs
    ]
    both = [by_text - by_task for by_text, by_task in each if by_text is not None and by_task is not None]
    if both:
        lines.append(f"Perplexity comes back further in {sum(value > 0 for value in both)} of {len(both)} pairs.")
    clear = apart["p"] < ALPHA
    more, less = ("perplexity", "accuracy") if apart["value"] > 0 else ("accuracy", "perplexity")
    facts = (
        f"{formatting.share(loss)} of the lost log-perplexity on {text} comes back, and {formatting.share(accuracy)} of "
        "the lost accuracy"
    )
    sentence = f"Not enough evidence that it moves: {facts}, which do not differ beyond noise."
    if clear:
        sentence = f"It moves towards {more}: {facts}, so fine-tuning mends {more} further than {less}."
    return Answer("tradeoff", question, CLEAR if clear else UNDECIDED, sentence, lines)


def _quadrants(pairs, text):
    """How often both, one or none of the two got clearly better."""
    words = [(p.comparison["average_acc"]["verdict"], p.comparison["perplexity"][text]["verdict"]) for p in pairs]
    both = words.count(("better", "better"))
    traded = sum(set(pair) == {"better", "worse"} for pair in words)
    return (
        f"Fine-tuning improves both clearly in {both} of {formatting.count(len(pairs), 'pair')}, and trades one for "
        f"the other in {traded}."
    )


def _families(study, evidence):
    """Question 4: whether architectures differ."""
    question = "Do architectures differ in what comes back?"
    groups = {}
    for pair in usable(study, evidence):
        family = study.models[pair.model]["family"]
        if family:
            groups.setdefault(family, []).append(pair)
    if len({facts["family"] for facts in study.models.values() if facts["family"]}) < 2:
        return _absent("families", question, "The study has one architecture: there is nothing to compare it with.")
    if len(groups) < 2:
        return Answer("families", question, UNDECIDED, "Not enough evidence: one architecture was compared by now.")
    return _groups_differ("families", question, evidence.accuracy, groups)


def _groups_differ(key, question, means, groups):
    """Whether recovered shares differ between named groups of pairs, two by two, Holm-corrected."""
    ratios = {name: means.ratio(*shares(pairs)) for name, pairs in groups.items()}
    lines = [
        f"{name}: {formatting.share(ratio)} comes back ({formatting.pairs(groups[name])})."
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
        sentence = "Not enough evidence: " + (
            f"the shares that come back ({formatting.ratios(ratios)}) do not differ beyond noise."
            if tests
            else "what pruning lost is within noise in all groups but one."
        )
        return Answer(key, question, UNDECIDED, sentence, lines)
    if len(clear) > NAMED:
        order = sorted(ratios, key=lambda name: ratios[name]["value"])
        least, most = (f"{name} {formatting.share(ratios[name])}" for name in (order[0], order[-1]))
        sentence = f"Yes, in these models: {len(clear)} of {len(tests)} pairs of groups differ, from {least} to {most}."
        return Answer(key, question, CLEAR, sentence, lines)
    named = []
    for first, second, found in clear:
        more, less = (first, second) if found["value"] > 0 else (second, first)
        named.append(f"{more} recovers {formatting.share_points(found)} more than {less}")
    return Answer(key, question, CLEAR, f"Yes, in these models: {formatting.listed(named)}.", lines)


def _variants(study, evidence):
    """Question 5: whether instruct and base models differ, over those that have their partner."""
    question = "Do instruct and base models differ in what comes back?"
    partners = _partners(study)
    if not partners:
        return _absent("variants", question, "No model of the study has its base or instruct partner.")
    pairs = {(pair.model, pair.config): pair for pair in usable(study, evidence)}
    groups = {"instruct": [], "base": []}
    for base, instruct in partners:
        for config in study.configs:
            if (base, config) in pairs and (instruct, config) in pairs:
                groups["base"].append(pairs[base, config])
                groups["instruct"].append(pairs[instruct, config])
    if not groups["base"]:
        return Answer("variants", question, UNDECIDED, "Not enough evidence: no two partners were compared by now.")
    return _groups_differ("variants", question, evidence.accuracy, groups)


def _partners(study):
    """[(base model, instruct model)] of one family: those that belong together by their names, else the only two."""
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
