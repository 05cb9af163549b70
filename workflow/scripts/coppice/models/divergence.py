"""Measure how far a student's predictions are from a teacher's, without the logits of all tokens in memory.

The divergence is KL(teacher || student), KL(student || teacher), or the generalized Jensen-Shannon divergence between
them (Agarwal et al. 2024, arXiv:2306.13649), over the whole vocabulary. Cross-entropy is added in the same pass, which
needs the student's logits anyway. `output_head` has the cross-entropy alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.utils.checkpoint

from . import output_head

if TYPE_CHECKING:
    from torch import nn
    from torch.autograd.function import BackwardCFunction


@dataclass(frozen=True)
class Mixture:
    """The terms of a loss: ce * cross-entropy + kl * temperature^2 * divergence.

    Attributes:
        ce: the weight of the cross-entropy of the targets, which is taken at temperature 1.
        kl: the weight of the divergence.
        temperature: divides the logits of both models in the divergence. Its square undoes that gradients shrink.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher). Between them, the divergence is
            beta * KL(teacher || m) + (1 - beta) * KL(student || m) with m = beta * teacher + (1 - beta) * student.
    """

    ce: float = 0.0
    kl: float = 1.0
    temperature: float = 1.0
    beta: float = 0.0


class Predictions(NamedTuple):
    """What a model predicts at N positions.

    states: [N, width], before the head; or logits [N, vocabulary] if `head` is None.
    """

    states: torch.Tensor
    head: nn.Module | None


def summed_loss(student: Predictions, teacher: Predictions, targets: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """Return the loss of `mixture`, summed over N positions: a float32 scalar.

    Gradients flow to the student's states and to its head if that is trained, and never to the teacher. A chunk of the
    positions is in memory at a time, forwards and backwards. The sums are in float32, whatever the models' dtypes.

    Args:
        student: the predictions to be trained.
        teacher: those to be like, over the same vocabulary.
        targets: the right tokens, [N].
        mixture: the weights of the terms.
    """
    states, head = student
    teacher = Predictions(teacher.states.detach(), teacher.head)
    if head is None:
        return _Loss.apply(states, None, None, teacher, targets, mixture)
    if output_head.is_plain(head):
        return _Loss.apply(states, head.weight, head.bias, teacher, targets, mixture)
    total = states.new_zeros((), dtype=torch.float32)
    rows = _rows(head.weight.shape[0])
    for part, other, wanted in zip(states.split(rows), teacher.states.split(rows), targets.split(rows), strict=True):
        # The module itself must run, because an adapter or quantized weights are more than its weight.
        total = total + torch.utils.checkpoint.checkpoint(
            lambda x, y, t: _Loss.apply(head(x), None, None, Predictions(y, teacher.head), t, mixture),
            *(part, other, wanted),
            use_reentrant=False,
        )
    return total


def _rows(vocabulary: int) -> int:
    # Half as many as for the cross-entropy alone: matrix products with still fewer rows are slower.
    return max(1, output_head.chunk_rows(vocabulary) // 2)


class _Loss(torch.autograd.Function):
    """Sum the loss; the forward pass computes the gradients too, as long as a chunk's logits are there.

    So nothing of the size of the vocabulary is kept for the backward pass, except the gradient of a head that is
    trained, and no logits are computed twice.
    """

    @staticmethod
    def forward(
        ctx: BackwardCFunction,
        states: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        teacher: Predictions,
        targets: torch.Tensor,
        mixture: Mixture,
    ) -> torch.Tensor:
        rows = _rows(states.shape[1] if weight is None else weight.shape[0])
        of_states, of_weight, of_bias = ctx.needs_input_grad[:3]
        gradients = [
            torch.empty_like(states) if of_states else None,
            # float32, because half precision would lose what each of many chunks adds
            torch.zeros_like(weight, dtype=torch.float32) if of_weight else None,
            torch.zeros_like(bias, dtype=torch.float32) if of_bias else None,
        ]
        total = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            given = states[part] if weight is None else states[part].to(weight.dtype)
            ours = given if weight is None else torch.nn.functional.linear(given, weight, bias)
            loss, slope = _terms(
                ours.float(), _logits(teacher.states[part], teacher.head).to(ours.device), targets[part], mixture
            )
            total += loss
            if of_states:
                gradients[0][part] = slope if weight is None else slope.to(weight.dtype) @ weight
            if of_weight:
                gradients[1] += (slope.to(weight.dtype).T @ given).float()
            if of_bias:
                gradients[2] += slope.sum(0)
        ctx.save_for_backward(*gradients)  # and not as attributes, which checkpointing would keep for all chunks
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (states, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: BackwardCFunction, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # `upstream`, a scalar, is the gradient of the sum, which the forward pass took as 1
        found = [
            None if gradient is None else (gradient * upstream.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None)


def _logits(states: torch.Tensor, head: nn.Module | None) -> torch.Tensor:
    return (states if head is None else head(states)).float()


def _terms(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, mixture: Mixture
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (summed loss, its gradient [n, vocabulary]) of a chunk's float32 logits [n, vocabulary]."""
    warmth = mixture.temperature
    theirs = torch.log_softmax(teacher / warmth, 1)
    ours = torch.log_softmax(student / warmth, 1)
    if mixture.beta == 0:
        other = theirs.exp()
        loss = theirs.sub_(ours).mul_(other).sum()
        slope = ours.exp_().sub_(other)
    else:
        loss, slope = _backward_divergence(ours, theirs, mixture.beta)
    loss, slope = mixture.kl * warmth**2 * loss, slope.mul_(mixture.kl * warmth)
    if mixture.ce:
        wanted = targets[:, None]
        plain = torch.log_softmax(student, 1)
        loss = loss - mixture.ce * plain.gather(1, wanted).sum()
        slope.add_(plain.exp_(), alpha=mixture.ce)
        slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -mixture.ce))
    return loss, slope


def _backward_divergence(ours: torch.Tensor, theirs: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (summed divergence, gradient by the student's logits) for a `beta` above 0, from log-probabilities.

    The divergence's derivative by the student's probability p is a = (1 - beta) * log(p / m), and log(p / q) for
    beta 1; the softmax makes p * (a - sum(p * a)) of it.
    """
    own = ours.exp()
    if beta == 1:
        ratio = ours.sub_(theirs)
        loss = expected = (own * ratio).sum(1, keepdim=True)
    else:
        middle = torch.logaddexp(ours + math.log1p(-beta), theirs + math.log(beta))
        ratio = ours.sub_(middle).mul_(1 - beta)
        expected = (own * ratio).sum(1, keepdim=True)
        other = theirs.exp()
        loss = expected + beta * theirs.sub_(middle).mul_(other).sum(1, keepdim=True)
    return loss.sum(), ratio.sub_(expected).mul_(own)
