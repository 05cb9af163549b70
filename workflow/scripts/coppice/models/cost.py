"""Measure what a model costs to store and to run: its sizes, its multiply-accumulates, and its peak memory.

Times are not measured here, because other jobs run beside an evaluation (see `stages.evaluate.latency`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from coppice import models
from coppice.core import records
from coppice.core.aliases import Record

from . import timing

if TYPE_CHECKING:
    from .kinds import LoadedModel

logger = logging.getLogger("coppice.cost")

PROTOCOL = 2  # increase it if a change of method makes measured costs obsolete


def measure(model: LoadedModel, merged: bool, settings: timing.CostSettings) -> Record:
    """Return the cost of a loaded model.

    Args:
        model: a model that writes text.
        merged: whether an adapter was merged into it; only recorded.
        settings: the section `evaluate.cost`.

    Returns:
        {parameters, active_parameters, nonzero_parameters, weight_bytes, macs_per_token: {linear, attention,
        context_length}, adapter_merged, dtype, device, threads, prompt_tokens, new_tokens, peak_memory_bytes}. See
        `footprint` for the numbers that are None if they are unknown. The peak on a GPU is that
        of reading a prompt and writing tokens at the largest batch size, weights included; the peak on the host is that
        of the process so far.
    """
    import torch

    from . import footprint

    counted = footprint.measure(model)
    prompt, new = timing.lengths(settings, models.context_length(model))
    if model.get_input_embeddings().weight.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timing.run(model, max(settings.batch_sizes), prompt, new)
    macs = {"linear": counted["linear_macs"], "attention": counted["attention_macs"]}
    logger.info("%s MACs per token", "unknown" if macs["linear"] is None else f"{macs['linear']:.4g}")
    return {
        "parameters": counted["parameters"],
        "active_parameters": counted["active_parameters"],
        "nonzero_parameters": footprint.nonzero_parameters(model),
        "weight_bytes": footprint.weight_bytes(model),
        "macs_per_token": macs | {"context_length": counted["context_length"]},
        "adapter_merged": merged,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": prompt,
        "new_tokens": new,
    } | records.running()
