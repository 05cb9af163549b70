"""Decide whether a training keeps its activations or computes them again in the backward pass."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from coppice.models import estimates

from .training_request import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("coppice.finetuning")


def checkpoints_activations(model: PreTrainedModel, settings: TrainingSettings) -> bool:
    """Return whether to recompute activations in the backward pass.

    The setting `gradient_checkpointing` decides; if it is null, activations are recomputed if they would take more than
    80 % of the free GPU memory, by the estimate of `estimates.kept_values`.
    """
    wanted = settings.gradient_checkpointing
    if wanted is not None:
        return wanted
    import torch

    if not torch.cuda.is_available():
        return False
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widths = estimates.kept_values(config.hidden_size, inner)
    tokens = settings.micro_batch_size * settings.data.cutoff_len
    needed = tokens * config.num_hidden_layers * widths * next(model.parameters()).element_size()
    free, _ = torch.cuda.mem_get_info()
    if needed > 0.8 * free:
        logger.info(
            "gradient checkpointing is on: activations would take %.1f of %.1f GB of free memory",
            needed / 1e9,
            free / 1e9,
        )
    return needed > 0.8 * free
