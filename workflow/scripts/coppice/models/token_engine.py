"""What the engines of all models that predict tokens share: the limit of a micro-batch, and its loss.

`packing` (causal), `seq2seq_batches` and `image_text_batches` have the engines themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from . import estimates, output_head
from .kinds import MicroBatch


class HeadedForward(Protocol):
    """A `kinds.Forward` that knows the output layer, which is None if the model changes its logits after it."""

    device: torch.device
    head: nn.Module | None


class TokenEngine:
    """Sums the loss of target tokens, with the output layer applied at their positions only; see `kinds.Engine`.

    Args:
        forward: runs the model up to its output layer.
        token_limit: the most tokens in a micro-batch; an example that is longer runs alone.
    """

    warnings: Sequence[str] = ()

    def __init__(self, forward: HeadedForward, token_limit: int) -> None:
        """Fit the limit to the device."""
        self.forward = forward
        # larger micro-batches gain nothing on a CPU; measured with one thread
        on_cpu, most = forward.device.type == "cpu", estimates.CPU_TOKENS * torch.get_num_threads()
        self.token_limit = min(token_limit, most) if on_cpu else token_limit

    def summed_loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the summed negative log-likelihood of a micro-batch's targets, in nats: a float32 scalar."""
        # A sum, not a mean: averaging each micro-batch would weight a target by how few others share its micro-batch.
        # The trainer divides by the targets of the whole step.
        states, head = micro.run(self.forward), self.forward.head
        if head is None:  # the model changes its logits after the output layer, so `states` are the full logits
            return output_head.summed_loss_of_logits(states, micro.targets.to(states.device))
        # The module itself is passed on, not its weight: it may carry an adapter, a bias or quantized weights.
        states = states.to(head.weight.device)
        return output_head.summed_loss(head, states, micro.targets.to(states.device))
