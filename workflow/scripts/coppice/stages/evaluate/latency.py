"""Time a dense model and its chosen candidates in turns, so that their latencies can be compared.

A latency depends on what else the machine does. One job therefore times all models of a comparison again and again,
each round in the other order, and records the spread over the rounds. Weights of one architecture share their figures:
an unstructured candidate has the shapes of its dense model, a merged adapter those of its candidate.

Each turn loads its model and frees it, so that the job needs no more memory than an evaluation.
"""

import gc
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy

from coppice import models
from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.models import pruned_shapes, timing

logger = logging.getLogger("coppice.latency")

ROUNDS = 7
QUARTILES = (50, 25, 75)
Times = dict[int, list[tuple[float, float]]]  # batch size -> (seconds of the prompt, seconds of a token), by round


@dataclass(frozen=True)
class LatencyRequest:
    """A dense model and candidates of it; all are loaded with the same options."""

    source: models.Source
    """The dense model."""
    candidates: Mapping[str, PathLike]
    """name -> folder."""
    settings: timing.CostSettings
    """The section `evaluate.cost`."""


def measure(identity: Record, request: LatencyRequest, output: PathLike) -> None:
    """Write `latency.json`: the latency of every architecture among the models, with its spread over the rounds.

    The record holds {dense: architecture, candidates: {name: architecture}, architectures: {architecture: [{batch_size,
    prompt_seconds, token_seconds}]}, prompt_tokens, new_tokens, rounds}. Each number of seconds is {value, low, high,
    rounds}: the median and the quartiles over the rounds, and the value of each. A kind of model without evaluator
    "cost" has no architectures.
    """
    clock = records.Clock()
    folders = {None: request.source.path, **request.candidates}
    shapes = {name: _architecture(folder) for name, folder in folders.items()}
    sources = {}
    for name, folder in folders.items():
        sources.setdefault(shapes[name], replace(request.source, path=str(folder)))
    facts = identity | {"dense": shapes.pop(None), "candidates": shapes, "architectures": {}, "rounds": ROUNDS}
    if "cost" in models.kind_of(request.source).evaluators:
        times, lengths = _in_turns(sources, request.settings)
        facts["architectures"] = {name: _summary(own) for name, own in times.items()}
        facts |= dict(zip(("prompt_tokens", "new_tokens"), lengths, strict=True))
    prints = {name or "dense": fingerprints.weights(folder) for name, folder in folders.items()}
    settings = {"batch_sizes": request.settings.batch_sizes} | {"loading": _loading(request.source)}
    records.write(output, facts | {"provenance": clock.provenance(settings, weights=prints)})


def _architecture(folder: PathLike) -> str:
    """Return a name for the shapes of a checkpoint's tensors, which decide how long a dense kernel computes."""
    shapes = pruned_shapes.tensor_shapes(folder)
    # `.bin` files do not tell the shapes without being loaded; such a checkpoint is an architecture of its own
    return records.digest({key: list(shape) for key, shape in shapes.items()} if shapes else str(folder))[:12]


def _loading(source: models.Source) -> Record:
    return {key: getattr(source, key) for key in ("dtype", "quantize")}


def _in_turns(
    sources: Mapping[str, models.Source], settings: timing.CostSettings
) -> tuple[dict[str, Times], tuple[int, int]]:
    """Return {architecture: `Times`} and (prompt, new) tokens."""
    times: dict[str, Times] = {name: {batch: [] for batch in settings.batch_sizes} for name in sources}
    lengths = (0, 0)
    for place in range(ROUNDS):
        for name in _order(sources, place):
            model = models.load(sources[name])
            lengths = timing.lengths(settings, models.context_length(model))
            for batch, rounds in times[name].items():
                rounds.append(timing.measure(model, batch, *lengths))
            del model
            gc.collect()  # the model's hooks and modules refer to each other; its memory is needed by the next one
        logger.info("round %d of %d", place + 1, ROUNDS)
    return times, lengths


def _order(names: Iterable[str], place: int) -> list[str]:
    """Return the names in their order or, in every second round, in the reverse: a slow drift then cancels out."""
    return list(names)[:: -1 if place % 2 else 1]


def _summary(times: Times) -> list[Record]:
    """Return the figures of one architecture for each batch size."""
    keys = ("prompt_seconds", "token_seconds")
    return [
        {"batch_size": batch} | {key: _spread([one[place] for one in rounds]) for place, key in enumerate(keys)}
        for batch, rounds in times.items()
    ]


def _spread(values: list[float]) -> Record:
    value, low, high = (float(bound) for bound in numpy.percentile(values, QUARTILES))
    return {"value": value, "low": low, "high": high, "rounds": values}
