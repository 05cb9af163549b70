"""Write numbers for readers: points, shares, ratios, p-values and their intervals, and short sentences with them."""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from coppice.core.aliases import Estimate, Record
from coppice.stats.metrics import Metric

if TYPE_CHECKING:
    from coppice.stats.across_models import Means  # imports numpy, which `coppice show` does not need


class Pair(Protocol):
    """A model and a config, as the report's `study_records.Pair` has them."""

    model: str
    config: str


def margin(second: Record) -> str:
    """Return "next NAME, 0.01 behind (within noise: ...)" for {candidate, margin, interval, within_noise}."""
    text = f"next {second['candidate']}, {second['margin']:.4g} behind"
    if second.get("within_noise") is None:
        return text
    low, high = second["interval"]
    noise = "within noise" if second["within_noise"] else "beyond noise"
    caveat = (second.get("resampled") or {}).get("note")  # records of earlier versions have no `resampled`
    return f"{text} ({noise}: difference {low:.4g} to {high:.4g}{f'; {caveat}' if caveat else ''})"


def units(resampled: Record) -> str:
    """Return what an interval resamples: "60 documents", "45 windows in blocks of 9"."""
    blocks = f" in blocks of {resampled['block']}" if resampled["block"] else ""
    return f"{resampled['count']} {resampled['unit']}{blocks}"


def reused(config: str) -> str:
    """Return the note on results that were taken from another config."""
    return f"the same candidate as {config}; both use its training and its evaluations"


def count(number: int, noun: str) -> str:
    """Return a count with its noun: "1 model", "6 models"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(items: Iterable[object]) -> str:
    """Join items as "a, b and c"."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def warned(by_name: Mapping[str, Sequence[str]]) -> list[str]:
    """Return each warning once, led by the names that it concerns unless it concerns all of `by_name`."""
    found: dict[str, list[str]] = {}
    for name, warnings in by_name.items():
        for warning in dict.fromkeys(warnings):
            found.setdefault(warning, []).append(name)
    return [text if len(names) == len(by_name) else f"{listed(names)}: {text}" for text, names in found.items()]


def settings(values: Record | None) -> str:
    """Return settings on one line, such as "method width, ratio 0.25", without those that are not set."""
    parts = []
    for key, value in (values or {}).items():
        if isinstance(value, dict):
            parts.append(f"{key} ({settings(value)})")
        elif value is not None and value != []:
            shown = "+".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"{key} {shown}")
    return ", ".join(parts)


def pruning(point: Record) -> str:
    """Return on one line how a candidate was pruned, without its name and without what has no effect."""
    idle = {"name": point.get("name"), "consecutive": False, "keep_blocks": {"first": 0, "last": 0}, "steps": 1}
    told = {key: value for key, value in point.items() if key not in idle or value != idle[key]}
    first = {key: told[key] for key in ("method", "ratio") if key in told}
    return settings(first | told)


def percent(value: float) -> str:
    """Return a share as a percentage: "62 %"."""
    return f"{round(100 * value)} %"  # a share just below zero is 0 %, not -0 %


def bounds(interval: Sequence[float] | None, scale: float = 100, digits: int = 1, signed: bool = False) -> str:
    """Return an interval with a space before it, " [0.4, 2.0]", or "" if there is none."""
    if interval is None:
        return ""
    low, high = (scale * bound for bound in interval)
    sign = "+" if signed else ""
    return f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def either(items: Sequence[str]) -> str:
    """Join items as "a, b or c"."""
    return " or ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def name(pair: Pair) -> str:
    """Return "MODEL / CONFIG"."""
    return f"{pair.model} / {pair.config}"


def pairs(found: Collection[Pair]) -> str:
    """Return a count of pairs and models: "12 pairs of 6 models"."""
    return f"{count(len(found), 'pair')} of {count(len({pair.model for pair in found}), 'model')}"


def difference(metric: Metric, estimate: Estimate, signed: bool = False, size: bool = False) -> str:
    """Return a difference of values of a metric: "1.2 points [0.4, 2.0] ahead of" or "... behind".

    With `signed` the number has its sign, with `size` it is an amount; neither ends in "ahead of" or "behind".
    """
    value, interval = estimate["value"], estimate["interval"]
    scale, digits, unit = metric.scale, metric.digits, f" {metric.difference_unit}".rstrip()
    if signed:
        return f"{metric.shown(value, '+')}{unit}{bounds(interval, scale, digits, signed=True)}"
    side = "ahead of" if (value >= 0) == metric.higher_is_better else "behind"
    if value < 0:
        value, interval = -value, interval and [-interval[1], -interval[0]]
    text = f"{metric.shown(value)}{unit}{bounds(interval, scale, digits)}"
    return text if size else f"{text} {side}"


def compared(metric: Metric, estimate: Estimate) -> str:
    """Return how a value compares with another, before "that of": "0.93 times [0.90, 0.96]", "1.2 points behind"."""
    return times(estimate) if metric.log else difference(metric, estimate)


def share(ratio: Estimate) -> str:
    """Return a recovered share with its interval: "62 % [55, 69]"."""
    if ratio["value"] is None:
        return "an undefined share"
    return percent(ratio["value"]) + bounds(ratio["interval"], digits=0)


def ratios(by_name: Mapping[str, Estimate]) -> str:
    """Return the recovered share of each group: "Llama 62 % [55, 69], Qwen ..."."""
    return ", ".join(f"{group} {share(ratio)}" for group, ratio in by_name.items())


def share_points(estimate: Estimate) -> str:
    """Return a difference of shares as an amount: "31 percentage points [12, 50]"."""
    value, interval = estimate["value"], estimate["interval"]
    if value < 0:
        value, interval = -value, interval and [-interval[1], -interval[0]]
    return f"{100 * value:.0f} percentage points{bounds(interval, digits=0)}"


def times(estimate: Estimate) -> str:
    """Return a difference of logarithms as a ratio: "0.93 times [0.90, 0.96]"."""
    interval = estimate["interval"] and [math.exp(bound) for bound in estimate["interval"]]
    return f"{math.exp(estimate['value']):.2f} times{bounds(interval, scale=1, digits=2)}"


def probability(p: float) -> str:
    """Return a p-value for a sentence: "p < 0.001", "p = 0.012"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def beyond(p: float | None, noun: str, found: int, needed: int) -> str:
    """Return a sentence on whether other models can be expected to do the same, from a permutation test over models.

    p: of the test, None if there are too few models. found, needed: numbers of models; noun: what they are.
    """
    if p is None:
        return f"There are too few {noun} to say anything about other models: {found}, and it takes {needed}."
    agree = "agree enough" if p < 0.05 else "differ too much"
    return f"The models {agree} to expect the same of similar models (permutation test over models, {probability(p)})."


def exchange(
    first: tuple[Metric, "Means"], second: tuple[Metric, "Means"], columns: Sequence[Sequence[Hashable]]
) -> str:
    """Return a sentence on how pruned and fine-tuned models differ from the dense ones in two metrics.

    first, second: (metric, its `Means`); columns: for each pair, the names of its (dense, pruned, finetuned) means.
    """
    clauses = []
    for label, place in (("pruned models", 1), ("fine-tuned ones", 2)):
        terms = {}
        for row in columns:
            terms[row[place]] = terms.get(row[place], 0) + 1 / len(columns)
            terms[row[0]] = terms.get(row[0], 0) - 1 / len(columns)
        apart = [_apart(metric, means.contrast(terms)) for metric, means in (first, second)]
        clauses.append(f"{label} {listed(apart)}")
    metric, _ = second
    return f"Compared with the dense models, {clauses[0]}{f' on {metric.name}' if metric.name else ''}; {clauses[1]}."


def _apart(metric: Metric, estimate: Estimate) -> str:
    if metric.log:
        return f"have {times(estimate)} the {metric.kind}"
    return f"differ by {difference(metric, estimate, signed=True)} in {metric.kind if metric.name else metric.spoken}"


def plain_probability(p: float | None) -> str:
    """Return a p-value for the cell of a table."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Return a duration: "45 s", "12 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def memory(peaks: Mapping[str, float] | None) -> str:
    """Return peak memory: "host 1.2 GiB, GPU 24.1 GiB"."""
    return ", ".join(f"{kind.replace('gpu', 'GPU')} {size / 2**30:.1f} GiB" for kind, size in (peaks or {}).items())


def shortened(text: str, limit: int = 60) -> str:
    """Return the beginning of a long text on one line; the log has the rest."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
