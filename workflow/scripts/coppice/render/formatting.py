"""Numbers as a reader meets them: points, shares, ratios and p-values with their intervals, in words."""

import math


def margin(second):
    """ "next NAME, 0.01 behind (within noise: ...)" of a runner-up, {candidate, margin, interval, within_noise}."""
    words = f"next {second['candidate']}, {second['margin']:.4g} behind"
    if second.get("within_noise") is None:
        return words
    low, high = second["interval"]
    sure = "within noise" if second["within_noise"] else "beyond noise"
    return f"{words} ({sure}: difference {low:.4g} to {high:.4g})"


def reused(config):
    """What is said of results that were taken over from another config."""
    return f"the same candidate as {config}, whose training and evaluations are used for both"


def count(number, noun):
    """ "1 model", "6 models"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(items):
    """ "a, b and c"."""
    items = [str(item) for item in items]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def percent(value):
    """ "62 %" of a share."""
    return f"{100 * value:.0f} %"


def bounds(interval, scale=100, digits=1, signed=False):
    """ "[0.4, 2.0]", or "" without an interval."""
    if interval is None:
        return ""
    low, high = (scale * bound for bound in interval)
    sign = "+" if signed else ""
    return f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def either(items):
    """ "a, b or c"."""
    return " or ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def name(pair):
    return f"{pair.model} / {pair.config}"


def pairs(found):
    """ "12 pairs of 6 models"."""
    return f"{count(len(found), 'pair')} of {count(len({pair.model for pair in found}), 'model')}"


def points(estimate, signed=False, size=False):
    """A difference of accuracies: "1.2 points [0.4, 2.0] ahead of"; `signed` with its sign; `size` as an amount."""
    value, interval = estimate["value"], estimate["interval"]
    if signed:
        return f"{100 * value:+.1f} points{bounds(interval, signed=True)}"
    if value < 0:
        value, interval = -value, interval and [-interval[1], -interval[0]]
        side = "behind"
    else:
        side = "ahead of"
    text = f"{100 * value:.1f} points{bounds(interval)}"
    return text if size else f"{text} {side}"


def share(ratio):
    """A recovered share: "62 % [55, 69]"."""
    if ratio["value"] is None:
        return "an undefined share"
    return percent(ratio["value"]) + bounds(ratio["interval"], digits=0)


def ratios(by_name):
    return ", ".join(f"{group} {share(ratio)}" for group, ratio in by_name.items())


def share_points(estimate):
    """A difference of shares, as an amount: "31 percentage points [12, 50]"."""
    value, interval = estimate["value"], estimate["interval"]
    if value < 0:
        value, interval = -value, interval and [-interval[1], -interval[0]]
    return f"{100 * value:.0f} percentage points{bounds(interval, digits=0)}"


def times(estimate):
    """A difference of losses as a ratio of perplexities: "0.93 times [0.90, 0.96]"."""
    interval = estimate["interval"] and [math.exp(bound) for bound in estimate["interval"]]
    return f"{math.exp(estimate['value']):.2f} times{bounds(interval, scale=1, digits=2)}"


def probability(p):
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def beyond(p, noun):
    """What may be said of other models, from a permutation test over models."""
    if p is None:
        return f"Of other models nothing can be said: there are too few {noun}."
    agree = "agree enough to expect the same" if p < 0.05 else "do not agree enough to expect the same"
    return f"The models {agree} of others like them (permutation test over models, {probability(p)})."


def ratio_of(means, gained, lost):
    """The plain ratio of two combinations, or None where it is undefined."""
    return means.ratio(gained, lost)["value"]


def by_model(means, found, shares):
    """The recovered share of each model among the pairs `found`, over its configs; undefined ones left out."""
    models = dict.fromkeys(pair.model for pair in found)
    values = [ratio_of(means, *shares([pair for pair in found if pair.model == model])) for model in models]
    return [value for value in values if value is not None]


def exchange(accuracy, losses, text, columns):
    """Where pruned and fine-tuned models stand from the dense ones, in points and in times the perplexity."""
    stands = []
    for label, place in (("pruned models", 1), ("fine-tuned ones", 2)):
        terms = {}
        for row in columns:
            terms[row[place]] = terms.get(row[place], 0) + 1 / len(columns)
            terms[row[0]] = terms.get(row[0], 0) - 1 / len(columns)
        stand, level = accuracy.contrast(terms), losses.contrast(terms)
        stands.append(f"{label} stand at {points(stand, signed=True)} and {times(level)} the perplexity")
    return f"From the dense models, {stands[0]} on {text}; {stands[1]}."


def plain_probability(p):
    """A p-value for a table's cell."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds):
    """ "45 s", "12 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def memory(peaks):
    """ "host 1.2 GiB, GPU 24.1 GiB"."""
    return ", ".join(f"{kind.replace('gpu', 'GPU')} {size / 2**30:.1f} GiB" for kind, size in (peaks or {}).items())


def shortened(text, limit=60):
    """The beginning of a long text, on one line: the log has the rest."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
