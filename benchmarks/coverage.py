"""How often a 95 % interval of `coppice.stats` covers the truth: windows that are alike, and few and many documents.

Two models read the same text. A window's loss is that of the text plus the model's effect, and each of the two follows
an autoregression of order 1, with the same or other memory. The truth is a difference of zero. Documents have
log-normal sizes like those of WikiText, a level of their own, and noise that shrinks with their size. Beside each
coverage: that of resampling windows (or tokens' documents) one by one with a normal quantile, as a naive interval does,
and the width of the interval relative to that of a known standard error.

    python benchmarks/coverage.py                 # the table in docs/explanation/statistics.md, minutes
    python benchmarks/coverage.py --repeats 500
    python benchmarks/coverage.py --wikitext DIR  # DIR/test.jsonl, and other *.jsonl with `text` to count n-grams in
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy
from common import ROOT  # noqa: F401  puts the package on sys.path
from scipy.signal import lfilter
from scipy.stats import norm

from coppice.stages.evaluate import documents as documents_of
from coppice.stats import across_models, stored_samples

Z = norm.ppf(0.975)
WINDOWS = (24, 45, 160, 379, 1500)  # PTB has some 45 windows of 2048 tokens, and some 700 of 128
DOCUMENTS = (8, 12, 20, 60, 200)  # WikiText-2 has 60 in its test split
MEMORY = ((0.0, 0.0), (0.3, 0.5), (0.5, 0.3))  # of the text, and of the effect

Sample = tuple[numpy.ndarray, numpy.ndarray | None]  # losses [2, units] of two models, and the tokens [units]


def autoregression(random: numpy.random.Generator, count: int, memory: float) -> numpy.ndarray:
    """Return a stationary autoregression [count] of order 1 with variance 1."""
    noise = random.normal(size=count + 200)
    return lfilter([1.0], [1.0, -memory], noise)[200:] * numpy.sqrt(1 - memory**2)


def windows(random: numpy.random.Generator, count: int, text: float, effect: float) -> Sample:
    """Return the losses [2, windows] of two models, whose difference has expectation 0."""
    level = autoregression(random, count, text)
    return numpy.stack([level, level + 0.3 * autoregression(random, count, effect)]), None


def documents(random: numpy.random.Generator, count: int, own: float) -> Sample:
    """Return the losses [2, documents] of two models and the tokens [documents]; `own` is the sd of documents."""
    tokens = random.lognormal(numpy.log(3000), 0.75, count)
    level = random.normal(size=count)
    effect = own * random.normal(size=count) + 2 * random.normal(size=count) / numpy.sqrt(tokens)
    return numpy.stack([level, level + effect]), tokens


def covered(make: Callable[..., Sample], arguments: tuple, unit: str, repeats: int, seed: int) -> dict[str, float]:
    """Return how often intervals cover a difference of 0 and a level of 0, and the relative width of the former."""
    random = numpy.random.default_rng(seed)
    hits, naive_hits, level_hits, widths, values = 0, 0, 0, [], []
    for _ in range(repeats):
        losses, tokens = make(random, *arguments)
        means = across_models.means(("pruned", "tuned"), losses, tokens, unit)
        found = means.contrast({"tuned": 1, "pruned": -1})
        low, high = found["interval"]
        hits += low <= 0 <= high
        widths.append(high - low)
        values.append(found["value"])
        low, high = means.contrast({"pruned": 1})["interval"]
        level_hits += low <= 0 <= high
        [stratum] = means.strata
        one_by_one = float(numpy.linalg.norm(stratum.influence[1] - stratum.influence[0]))
        naive_hits += abs(found["value"]) < Z * one_by_one
    return {
        "difference": hits / repeats,
        "level": level_hits / repeats,
        "one by one": naive_hits / repeats,
        "width": float(numpy.mean(widths) / (2 * Z * numpy.std(values))),
    }


def real(folder: Path) -> Iterator[dict[str, float]]:
    """Yield the standard errors of the difference of two n-gram models on a real text, by the length of windows."""
    rows = {path.stem: [json.loads(line)["text"] for line in path.open()] for path in sorted(folder.glob("*.jsonl"))}
    test = rows.pop("test")
    known = " \n ".join(" \n ".join(other) for other in rows.values()).split(" ")
    single, double = Counter(known), Counter(pairwise(known))
    starts = [*documents_of.first_rows(test), len(test)]
    words = [[word for row in test[start:end] for word in row.split(" ")] for start, end in pairwise(starts)]
    owner = numpy.repeat(numpy.arange(len(words)), [len(each) for each in words])[1:]

    def loss(before: str, word: str, share: float) -> float:
        alone = (single[word] + 0.5) / (len(known) + 0.5 * (len(single) + 1e5))
        return -math.log((1 - share) * alone + share * double[before, word] / max(single[before], 1))

    told = list(pairwise(word for each in words for word in each))
    losses = numpy.array([[loss(*pair, share) for pair in told] for share in (0.0, 0.3)])
    tokens = numpy.bincount(owner)
    by_document = numpy.stack([numpy.bincount(owner, weights=row) / tokens for row in losses])
    step = {0: -1, 1: 1}
    whole, _ = across_models.means((0, 1), by_document, tokens, stored_samples.DOCUMENTS).error(step)
    for size in (128, 512, 2048):
        cut = losses[:, : losses.shape[1] // size * size].reshape(2, -1, size).mean(axis=2)
        effect = cut[1] - cut[0]
        yield {
            "windows": len(effect),
            "words": size,
            "correlation": float(numpy.corrcoef(effect[1:], effect[:-1])[0, 1]),
            "one by one": across_models.means((0, 1), cut).error(step)[0],
            "blocks": across_models.means((0, 1), cut, unit=stored_samples.WINDOWS).error(step)[0],
            "documents": whole,
        }


def main() -> None:
    """Print one JSON line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wikitext", type=Path)
    asked = parser.parse_args()
    if asked.wikitext:
        for found in real(asked.wikitext):
            print(json.dumps(found))
        return
    for count in WINDOWS:
        for text, effect in MEMORY:
            found = covered(windows, (count, text, effect), stored_samples.WINDOWS, asked.repeats, asked.seed)
            print(json.dumps({"windows": count, "text": text, "effect": effect} | found), flush=True)
    for count in DOCUMENTS:
        for own in (0.0, 0.1):
            found = covered(documents, (count, own), stored_samples.DOCUMENTS, asked.repeats, asked.seed)
            print(json.dumps({"documents": count, "own": own} | found), flush=True)


if __name__ == "__main__":
    main()
