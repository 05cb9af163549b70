"""Collect the warnings that belong to the numbers of an answer, so that nobody quotes the answer without them."""

import json
from collections.abc import Iterable, Sequence

from coppice.core.aliases import Record
from coppice.render import formatting
from coppice.stats import metrics

from . import group_answers
from .evidence import ABSENT, Answer, usable
from .measurements import Measurements
from .study_records import Pair, Study

SHOWN = 6  # warnings that an answer repeats; more would hide the answer
NAMED = 3  # a warning names at most this many pairs


def warnings(study: Study, measurements: Measurements, answer: Answer) -> list[str]:
    """Return the warnings of all pairs whose numbers an answer quotes, each once and with its pairs.

    To those of the comparisons come differences between models: one model's three stages are always measured alike,
    but two models may not be.
    """
    pairs = _quoted(study, measurements, answer)
    of_pairs = {}
    for pair in pairs:
        for text in dict.fromkeys((pair.comparison or {}).get("warnings") or []):
            of_pairs.setdefault(text, []).append(pair)
    ordered = sorted(of_pairs.items(), key=lambda entry: -len(entry[1]))
    found = [*_differences(pairs), *(f"{_owners(own, pairs)}: {text}" for text, own in ordered)]
    if len(found) > SHOWN + 1:
        rest = formatting.count(len(found) - SHOWN, "further warning")
        found[SHOWN:] = [f"{rest}: see each pair under “Model by model”."]
    return found


def _quoted(study: Study, measurements: Measurements, answer: Answer) -> list[Pair]:
    """Return the pairs that an answer is about."""
    if answer.verdict == ABSENT:
        return []
    if answer.key in ("recovery", "tradeoff"):  # other metrics than the leading one can answer these
        return study.compared
    pairs = usable(study, measurements)
    if answer.key == "families":
        return [pair for pair in pairs if study.models[pair.model]["family"]]
    if answer.key == "variants":
        names = {name for both in group_answers.partners(study) for name in both}
        return [pair for pair in pairs if pair.model in names]
    return pairs


def _owners(own: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    """Return the words for the pairs that have a warning."""
    if len(own) <= NAMED:
        return formatting.listed(map(formatting.name, own))
    return f"all {len(pairs)} pairs" if len(own) == len(pairs) else f"{len(own)} of {len(pairs)} pairs"


def _differences(pairs: Iterable[Pair]) -> list[str]:
    """Return a sentence for each metric that was not measured alike in all models of the pairs."""
    models = {pair.model: pair.dense for pair in pairs if pair.dense}
    found = []
    for metric in dict.fromkeys(one for record in models.values() for one in metrics.found_in(record)):
        if metric.mean_of:
            continue
        facts = {model: _facts(metric, record) for model, record in models.items() if metric.part(record)}
        for key in dict.fromkeys(key for own in facts.values() for key in own):
            values = dict.fromkeys(own.get(key) for own in facts.values())
            if len(values) > 1:
                shown = formatting.listed(map(str, values))
                found.append(f"{metric.label}: measured with different {key} in different models ({shown}).")
    return found


def _facts(metric: metrics.Metric, record: Record) -> dict[str, str]:
    """Return what must be equal in comparable measurements, as {name: text}, the engine included."""
    part = metric.part(record)
    facts = {key: part.get(key) for key in (*metric.alike, "engine")}
    for key, value in list(facts.items()):
        if isinstance(value, dict):  # name what differs, not the whole protocol
            facts |= facts.pop(key)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
