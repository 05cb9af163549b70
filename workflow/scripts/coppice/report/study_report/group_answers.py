"""Answer whether groups of models differ in how much they recover: architectures, and instruct and base models."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from coppice.render import formatting
from coppice.stats import paired_stats
from coppice.stats.across_models import Means
from coppice.stats.metrics import Metric

from .evidence import (
    ALPHA,
    CLEAR,
    Answer,
    not_applicable,
    once_per_candidate,
    reach,
    share_of,
    shares,
    undecided,
    usable,
)
from .measurements import Measurements
from .study_records import Pair, Study, family_of

ONE_MODEL = "A group of one model says nothing about other models."
NAMED = 3  # an answer spells out at most this many differences between groups


def families(study: Study, measurements: Measurements) -> Answer:
    """Answer question 4: whether architectures differ."""
    question = "Do architectures differ in how much they recover?"
    groups = {}
    for pair in usable(study, measurements):
        family = study.models[pair.model]["family"]
        if family:
            groups.setdefault(family, []).append(pair)
    if len({facts["family"] for facts in study.models.values() if facts["family"]}) < 2:
        return not_applicable("families", question, "The study has fewer than two architectures to compare.")
    if len(groups) < 2:
        return undecided("families", question, "fewer than two architectures have results yet")
    return _groups_differ("families", question, measurements, groups)


def _groups_differ(key: str, question: str, measurements: Measurements, groups: Mapping[str, Sequence[Pair]]) -> Answer:
    """Answer whether recovered shares differ between any two of `groups` (name -> pairs), with Holm's correction."""
    metric, means = measurements.leading
    groups = {name: once_per_candidate(pairs) for name, pairs in groups.items()}
    ratios = {name: means.ratio(*shares(metric, pairs)) for name, pairs in groups.items()}
    lines = [
        f"{name}: the recovered share is {share_of(ratio)} ({formatting.pairs(groups[name])})."
        for name, ratio in ratios.items()
    ]
    tests = []
    for first, second in combinations(groups, 2):
        found = means.ratio_difference(shares(metric, groups[first]), shares(metric, groups[second]))
        if found and found["p"] is not None:
            tests.append((first, second, found))
    by_model = [_by_model(metric, means, pairs) for pairs in groups.values()]
    enough = min(map(len, by_model)) > 1
    p, count = paired_stats.groups_differ(by_model), sum(map(len, by_model))
    verdict, line = reach(p, count, "recover a share") if enough else (CLEAR, ONE_MODEL)
    lines.append(line)
    corrected = paired_stats.holm([found["p"] for *_, found in tests])
    clear = [test for test, p in zip(tests, corrected, strict=True) if p < ALPHA]
    if not clear:
        why = "pruning lost more than noise in fewer than two groups"
        if tests:
            why = f"the recovered shares ({formatting.ratios(ratios)}) differ by no more than noise"
        return undecided(key, question, why, lines)
    if len(clear) > NAMED:
        order = sorted(ratios, key=lambda name: ratios[name]["value"])
        least, most = (f"{formatting.share(ratios[name])} ({name})" for name in (order[0], order[-1]))
        sentence = (
            f"Yes, in these models: {len(clear)} of {len(tests)} pairs of groups differ, with recovered shares from "
            f"{least} to {most}."
        )
        return Answer(key, question, verdict, sentence, lines)
    named = []
    for first, second, found in clear:
        more, less = (first, second) if found["value"] > 0 else (second, first)
        named.append(f"{more} recovers {formatting.share_points(found)} more than {less}")
    return Answer(key, question, verdict, f"Yes, in these models: {formatting.listed(named)}.", lines)


def _by_model(metric: Metric, means: Means, found: Sequence[Pair]) -> list[float]:
    """Return the recovered share of each model in the pairs `found`, over its configs, without undefined shares."""
    models = dict.fromkeys(pair.model for pair in found)
    own = ([pair for pair in found if pair.model == model] for model in models)
    values = (means.ratio(*shares(metric, pairs))["value"] for pairs in own)
    return [value for value in values if value is not None]


def variants(study: Study, measurements: Measurements) -> Answer:
    """Answer question 5: whether instruct and base models differ, over the models whose partner is in the study."""
    question = "Do instruct and base models differ in how much they recover?"
    found = partners(study)
    if not found:
        return not_applicable("variants", question, "The study has no base model together with its instruct partner.")
    pairs = {(pair.model, pair.config): pair for pair in usable(study, measurements)}
    groups = {"instruct": [], "base": []}
    for base, instruct in found:
        for config in study.configs:
            if (base, config) in pairs and (instruct, config) in pairs:
                groups["base"].append(pairs[base, config])
                groups["instruct"].append(pairs[instruct, config])
    if not groups["base"]:
        return undecided("variants", question, "no base model and its instruct partner both have results yet")
    return _groups_differ("variants", question, measurements, groups)


def partners(study: Study) -> list[tuple[str, str]]:
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
