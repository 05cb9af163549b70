"""Say how fast a pair's models are, if the measurement can tell them apart.

The figures come from the model's `latency.json`, whose models were timed in turns. An earlier version of Coppice timed
each model in its own evaluation; such figures show the load of the machine, so reports leave them out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from coppice.core.aliases import Record

from .study_records import Pair

WORDS = {"token_seconds": "ms per new token", "prompt_seconds": "ms to read the prompt"}


def of_pair(pair: Pair) -> dict[str, float] | None:
    """Return {stage: milliseconds per new token} at the first batch size, or None without a clear difference."""
    dense, pruned = next(_architectures(pair), (None, None))
    factor = dense and clear_ratio(dense["token_seconds"], pruned["token_seconds"])
    if not factor:
        return None
    first = 1000 * dense["token_seconds"]["value"]
    found = {"dense": first, "pruned": first * factor[0]}
    return found | ({"finetuned": found["pruned"]} if _is_merged(pair) else {})


def rows(pair: Pair) -> list[tuple[str, str]]:
    """Return the rows (what, text) of a pair's section on cost; none if no latency was measured."""
    found = []
    for dense, pruned in _architectures(pair):
        if dense is pruned:
            text = f"{_shown(dense['token_seconds'])} {WORDS['token_seconds']}; the pruned model has the dense shapes"
        else:
            text = "; ".join(_compared(dense[key], pruned[key], words) for key, words in WORDS.items())
        found.append((f"latency at batch size {dense['batch_size']}", text))
    return found


def clear_ratio(first: Record, second: Record) -> tuple[float, float, float] | None:
    """Return how many times as long `second` takes: the median over the rounds, and the quartiles.

    Each round timed both models one after the other, so a ratio within a round is free of loads that last longer.
    Returns None if the ratio differs from 1 by no more than its spread, which is the distance of the quartiles. With
    seven rounds of independent noise, that calls two equally fast models different in 3 to 6 % of simulations.
    """
    ratios = numpy.divide(second["rounds"], first["rounds"])
    value, low, high = (float(bound) for bound in numpy.percentile(ratios, (50, 25, 75)))
    return (value, low, high) if abs(value - 1) > high - low else None


def _architectures(pair: Pair) -> Iterator[tuple[Record, Record]]:
    """Yield (dense, pruned) of each batch size: the same object twice if both have one architecture."""
    record = pair.latency or {}
    names = record.get("dense"), (record.get("candidates") or {}).get(pair.candidate)
    measured = [(record.get("architectures") or {}).get(name) for name in names]
    if all(measured):
        yield from zip(*measured, strict=True)


def _is_merged(pair: Pair) -> bool:
    """Return whether the fine-tuned model has the pruned one's architecture: nothing is left beside its weights."""
    return bool(((pair.finetuned or {}).get("cost") or {}).get("adapter_merged"))


def _compared(dense: Record, pruned: Record, words: str) -> str:
    found = clear_ratio(dense, pruned)
    if not found:
        return f"no clear difference in {words} between the dense and the pruned model"
    value, low, high = found
    times = f"{value:.2f} times [{low:.2f}, {high:.2f}] that"
    return f"{_shown(dense)} {words} for the dense model, {times} for the pruned one"


def _shown(time: Record) -> str:
    low, high = 1000 * time["low"], 1000 * time["high"]
    return f"{1000 * time['value']:.1f} [{low:.1f}, {high:.1f}]"
