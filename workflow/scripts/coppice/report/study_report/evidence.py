"""What all answers share: their form, the pairs that can be compared, and the terms of recovered shares."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coppice.core.aliases import Estimate
from coppice.render import formatting
from coppice.stats import paired_stats
from coppice.stats.across_models import Means, Terms
from coppice.stats.metrics import Metric
from coppice.stats.paired_stats import LEVEL

from .measurements import Column, Measurements, column
from .study_records import Pair, Study

UNDECIDED = "not enough evidence"
CLEAR = "clear for these models"
GENERAL = "general"
ABSENT = "not applicable"
ALPHA = 1 - LEVEL
FEWEST_MODELS = 5  # a claim about models in general needs so many that differ


@dataclass
class Answer:
    """One answer.

    Attributes:
        key: its name.
        question: as the report asks it.
        verdict: `ABSENT`, `UNDECIDED`, `CLEAR` (the units that these models were tested on settle it, for these models)
            or `GENERAL` (and a test over models says to expect the same of other models).
        sentence: the answer itself.
        support: sentences with further numbers.
        warnings: what a reader must know before quoting the numbers.
    """

    key: str
    question: str
    verdict: str
    sentence: str
    support: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def beyond(key: str, differences: Sequence[float]) -> tuple[str, str]:
    """Return the verdict of a clear answer and a sentence on other models, from one difference for each model.

    key: what a model that counts does, for the sentence, such as "differ". A model without any difference does not
    count: a claim about other models needs `FEWEST_MODELS` that do.
    """
    return reach(paired_stats.sign_flip(differences), sum(value != 0 for value in differences), key)


def reach(p: float | None, models: int, key: str) -> tuple[str, str]:
    """Return the same from the p-value of a test over models, and the number of models that count."""
    enough = p is not None and models >= FEWEST_MODELS
    sentence = formatting.beyond(p if enough else None, f"models that {key}", models, FEWEST_MODELS)
    return GENERAL if enough and p < ALPHA else CLEAR, sentence


def not_applicable(key: str, question: str, why: str) -> Answer:
    """Return an answer that says why the study cannot have one."""
    return Answer(key, question, ABSENT, why)


def undecided(key: str, question: str, why: str, lines: Iterable[str] = ()) -> Answer:
    """Return an answer that says why the evidence is not enough."""
    return Answer(key, question, UNDECIDED, f"Not enough evidence: {why}.", list(lines))


def usable(study: Study, measurements: Measurements) -> list[Pair]:
    """Return the compared pairs with values of the leading metric for every row at all three stages."""
    _, means = measurements.leading
    return complete(study.compared, means)


def complete(pairs: Iterable[Pair], means: Means | None) -> list[Pair]:
    """Return the pairs whose three stages are columns of `means`; none if `means` is None."""
    return [pair for pair in pairs if means is not None and all(name in means for name in columns(pair))]


def once_per_candidate(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs without those of configs that chose the same candidate as an earlier one.

    They share its training and its evaluations, so a mean over all pairs would count these results twice.
    """
    first = {}
    for pair in pairs:
        first.setdefault((pair.model, pair.candidate), pair)
    return list(first.values())


def columns(pair: Pair) -> list[Column]:
    """Return the names of a pair's columns: dense, pruned, finetuned."""
    return [column(pair.model, pair.config, stage) for stage in ("dense", "pruned", "finetuned")]


def shares(metric: Metric, pairs: Iterable[Pair]) -> tuple[Terms, Terms]:
    """Return (gained by fine-tuning, lost by pruning), summed over `pairs`, as column -> weight for `Means.ratio`."""
    gained, lost = {}, {}
    sign = 1 if metric.higher_is_better else -1
    for pair in pairs:
        dense, pruned, finetuned = columns(pair)
        for terms, plus, minus in ((gained, finetuned, pruned), (lost, dense, pruned)):
            terms[plus] = terms.get(plus, 0) + sign
            terms[minus] = terms.get(minus, 0) - sign
    return gained, lost


def share_of(ratio: Estimate) -> str:
    """Return a recovered share as text, with the reason if it is undefined."""
    return "undefined, because pruning lost nothing" if ratio["value"] is None else formatting.share(ratio)


def lost_of(metric: Metric) -> str:
    """Return the word for what of a metric is lost and recovered: "log-perplexity", "accuracy"."""
    return f"log-{metric.kind}" if metric.log else metric.kind


def other_shares(study: Study, measurements: Measurements) -> list[tuple[Estimate, str]]:
    """Return [(ratio, sentence)] for each metric but the leading one: the recovered share over all pairs."""
    found = []
    for metric, means in measurements.others.items():
        pairs = once_per_candidate(complete(study.compared, means))
        if pairs:
            ratio = means.ratio(*shares(metric, pairs))
            place = f"On {metric.name}, the" if metric.name else "The"
            found.append((ratio, f"{place} recovered share of {lost_of(metric)} is {share_of(ratio)}."))
    return found
