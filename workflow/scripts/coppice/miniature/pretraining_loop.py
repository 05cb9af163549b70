"""The training loop of all tiny models.

Muon trains the hidden matrices and AdamW the rest; on models this small, this gives a far better model in the same time
than AdamW alone. The number of steps is fixed rather than the time, so that a slow machine trains the same model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger("coppice.miniature")

LOG_EVERY = 50  # steps
WARMUP_STEPS = 20  # a fifth of the steps, if that is less
# Parts of the names of matrices that look up a vector rather than map one
LOOKED_UP = ("embed", "shared", "relative", "lm_head")


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of the hidden matrices and of all other parameters."""

    muon: float
    adamw: float


def train(model: PreTrainedModel, batches: Iterable[dict[str, Any]], steps: int, rates: Rates) -> dict[str, float]:
    """Train a model, whose forward pass must return the loss, on the first `steps` of the batches of inputs.

    Returns:
        steps; final_loss, the mean over the last steps; seconds.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizers = _optimizers(model, rates)
    schedules = [get_cosine_schedule_with_warmup(o, min(WARMUP_STEPS, steps // 5), steps) for o in optimizers]
    model.train()
    start, losses = time.perf_counter(), []
    for step, inputs in zip(range(1, steps + 1), batches, strict=False):
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % LOG_EVERY == 0 or step == steps:
            recent, left = losses[-LOG_EVERY:], (time.perf_counter() - start) / step * (steps - step)
            logger.info("step %d/%d, loss %.3f, %.0f s left", step, steps, sum(recent) / len(recent), left)
    recent = losses[-LOG_EVERY:]
    return {"steps": steps, "final_loss": sum(recent) / len(recent), "seconds": time.perf_counter() - start}


def _optimizers(model: PreTrainedModel, rates: Rates) -> list[torch.optim.Optimizer]:
    import torch

    from .optimizer import Muon

    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and not any(word in name for word in LOOKED_UP)
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=rates.muon),
        torch.optim.AdamW(others, lr=rates.adamw, betas=(0.9, 0.95), weight_decay=0.0),
    ]
