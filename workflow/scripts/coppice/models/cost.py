"""Measure what a model costs to store and to run: its sizes, and the time to read a prompt and to write a token.

Sizes are exact. Times are measured on this machine while other jobs may run, so they compare models only roughly and
repeat only roughly. Nothing that must be reproducible depends on them.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from coppice import models
from coppice.core import records
from coppice.core.aliases import Record

if TYPE_CHECKING:
    import torch

    from .kinds import LoadedModel

logger = logging.getLogger("coppice.cost")

REPETITIONS = 3  # after one to warm up; the median is reported
CACHES = ("past_key_values", "cache_params")  # of attention, and of state-space models such as Mamba
SECONDS = 30.0  # no new repetition starts after this time

Result = TypeVar("Result")


class CostSettings(Protocol):
    """What is read of the section `evaluate.cost`."""

    batch_sizes: list[int]
    prompt_tokens: int
    new_tokens: int


def measure(model: LoadedModel, merged: bool, settings: CostSettings) -> Record:
    """Return the cost of a loaded model.

    Args:
        model: the causal LM.
        merged: whether an adapter was merged into it; only recorded.
        settings: the section `evaluate.cost`.

    Returns:
        {parameters, nonzero_parameters, weight_bytes, macs_per_token: {linear, attention, context_length},
        adapter_merged, dtype, device, threads, prompt_tokens, new_tokens, speed: [{batch_size,
        prefill_tokens_per_second, decode_seconds_per_token, repetitions}], peak_memory_bytes}. A decode step writes one
        token for each sequence of the batch. The peak on a GPU is that of these measurements, weights included; the
        peak on the host is that of the process so far.
    """
    import torch

    from . import footprint

    counted = footprint.measure(model)
    prompt, new = _lengths(settings, models.context_length(model))
    device = model.get_input_embeddings().weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        speed = [_speed(model, device, batch, prompt, new) for batch in settings.batch_sizes]
    macs = {"linear": counted["linear_macs"], "attention": counted["attention_macs"]}
    found = {
        "parameters": counted["parameters"],
        "nonzero_parameters": footprint.nonzero_parameters(model),
        "weight_bytes": footprint.weight_bytes(model),
        "macs_per_token": macs | {"context_length": counted["context_length"]},
        "adapter_merged": merged,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": prompt,
        "new_tokens": new,
        "speed": speed,
    } | records.running()
    logger.info("%.4g MACs per token, %s", counted["linear_macs"], ", ".join(map(_described, speed)))
    return found


def _described(speed: Record) -> str:
    return (
        f"batch {speed['batch_size']}: prompt {speed['prefill_tokens_per_second']:.0f} tokens/s, "
        f"{1000 * speed['decode_seconds_per_token']:.1f} ms per new token"
    )


def _lengths(settings: CostSettings, context: int) -> tuple[int, int]:
    """Return (prompt, new) tokens, cut to the context length of the model."""
    new = min(settings.new_tokens, max(1, context // 2))
    return max(1, min(settings.prompt_tokens, context - new)), new


def _speed(model: LoadedModel, device: torch.device, batch: int, prompt: int, new: int) -> Record:
    """Return the median time of a prompt over repetitions, and of a decode step over all steps of all repetitions."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    _once(model, ids, min(new, 2))  # warms up
    prefills, steps, started = [], [], time.perf_counter()
    while len(prefills) < REPETITIONS and (not prefills or time.perf_counter() - started < SECONDS):
        prefill, decode = _once(model, ids, new)
        prefills.append(prefill)
        steps += decode
    return {
        "batch_size": batch,
        "prefill_tokens_per_second": batch * prompt / statistics.median(prefills),
        "decode_seconds_per_token": statistics.median(steps),
        "repetitions": len(prefills),
    }


def _once(model: LoadedModel, ids: torch.Tensor, new: int) -> tuple[float, list[float]]:
    """Return the seconds for the prompt, and for each of the `new` steps after it."""
    prefill, output = _timed(ids, lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    steps = []
    for _ in range(new):
        token, cache = output.logits[:, -1:].argmax(-1), {name: output[name] for name in CACHES if name in output}
        seconds, output = _timed(ids, lambda t=token, c=cache: model(input_ids=t, use_cache=True, **c))
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
