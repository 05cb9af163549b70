"""Time how long a model takes to read a prompt and to write the tokens after it.

One timing says little on a machine that other jobs use. `stages.evaluate.latency` repeats it in turns with the models
that it is compared with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from . import kinds

if TYPE_CHECKING:
    import torch

    from .kinds import LoadedModel

REPETITIONS = 3  # after one to warm up; the median is returned
SECONDS = 10.0  # no new repetition starts after this time

Result = TypeVar("Result")


class CostSettings(Protocol):
    """What is read of the section `evaluate.cost`."""

    batch_sizes: list[int]
    prompt_tokens: int
    new_tokens: int


def lengths(settings: CostSettings, context: int) -> tuple[int, int]:
    """Return (prompt, new) tokens, cut to the context length of the model."""
    new = min(settings.new_tokens, max(1, context // 2))
    return max(1, min(settings.prompt_tokens, context - new)), new


def measure(model: LoadedModel, batch: int, prompt: int, new: int) -> tuple[float, float]:
    """Return the median seconds of a prompt over repetitions, and of a decode step over all steps of all repetitions.

    Args:
        model: in evaluation mode.
        batch: sequences at a time. A decode step writes one token for each.
        prompt: tokens of the prompt.
        new: tokens to write.
    """
    run(model, batch, prompt, min(new, 2))  # warms up
    prefills, steps, started = [], [], time.perf_counter()
    while len(prefills) < REPETITIONS and (not prefills or time.perf_counter() - started < SECONDS):
        prefill, decode = run(model, batch, prompt, new)
        prefills.append(prefill)
        steps += decode
    return statistics.median(prefills), statistics.median(steps)


def run(model: LoadedModel, batch: int, prompt: int, new: int) -> tuple[float, list[float]]:
    """Return the seconds for a prompt of random tokens, and for each of the `new` steps after it."""
    import torch

    kind, weights = kinds.of(model.config), model.get_input_embeddings().weight
    ids = torch.randint(weights.shape[0], (batch, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(weights.device)
    with torch.inference_mode():
        inputs = kind.timed_inputs(model, ids, None)
        prefill, output = _timed(ids, lambda: model(**inputs, use_cache=True))
        steps = []
        for _ in range(new):
            inputs = kind.timed_inputs(model, output.logits[:, -1:].argmax(-1), output)
            seconds, output = _timed(ids, lambda inputs=inputs: model(**inputs, use_cache=True))
            steps.append(seconds)
    return prefill, steps


def _timed(ids: torch.Tensor, call: Callable[[], Result]) -> tuple[float, Result]:
    """Return (seconds, what `call` returns)."""
    _wait(ids.device)  # a GPU works asynchronously: earlier work must not count, and this call's must be finished
    started = time.perf_counter()
    result = call()
    _wait(ids.device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
