"""Apply a causal language model's output layer only where a token is predicted, and in chunks.

The full `[batch, length, vocabulary]` logits of a model with a vocabulary of 128k are by far the largest tensor of an
evaluation, and most of them are never used. Here the body gives the hidden states, and the head (the output layer) runs
only on the rows that predict a token. Evaluation uses `token_losses` and `score`, training uses `summed_loss`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint
from torch import nn

from . import library_compat

if TYPE_CHECKING:
    from torch.autograd.function import BackwardCFunction
    from transformers import PreTrainedModel

    from .kinds import LoadedModel

logger = logging.getLogger("coppice.output_layer")

CHUNK_BYTES = 64 * 2**20  # of float32 logits in memory at a time
TRAINING_CHUNK_BYTES = 256 * 2**20  # matrix products are 13 % faster with 512 rows of a 128k vocabulary than with 128
CPU_TILE = 1024  # tokens of the vocabulary at a time; measured: a tile of a thousand rows then stays in the cache
GPU_TILE_VALUES = 2**26  # logits at a time
BITS = 1 / math.log(2)  # converts a natural logarithm to bits


def causal_lm(model: LoadedModel) -> PreTrainedModel:
    """Return the causal LM itself, without an adapter's wrapper; its LoRA layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parts(model: LoadedModel) -> tuple[nn.Module, nn.Linear] | tuple[None, None]:
    """Return (body, head) of `model` such that head(body(ids)) gives its logits; (None, None) if there are none.

    Some architectures scale or cap their logits after the head; a probe with a few tokens detects this.
    """
    causal = causal_lm(model)
    body, head = causal.base_model, causal.get_output_embeddings()
    if head is None or body is causal:  # a model without a separate body names itself as its `base_model`
        return None, None
    training = model.training
    model.eval()  # dropout would make the two results differ
    ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]  # every vocabulary has these
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = head(body(input_ids=ids, use_cache=False).last_hidden_state).float()
    model.train(training)
    # The same products, so any difference is a change of the logits; a cap changes small logits by very little.
    if not (expected - found).abs().max() <= 1e-5 * expected.abs().max():
        logger.warning("%s changes its logits after the output layer: computing full logits", type(causal).__name__)
        return None, None
    return body, head


def token_losses_of(model: LoadedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that gives the losses [B, L-1] of the tokens after the first, for token ids [B, L]."""
    body, head = parts(model)

    def losses(ids: torch.Tensor) -> torch.Tensor:
        library_compat.forget_lengths(model)  # or a model with dynamic NTK RoPE remembers texts that were scored before
        if body is None:  # the model changes its logits after the output layer, so they are needed in full
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        return token_losses(head, hidden.flatten(0, 1), ids[:, 1:].flatten()).view(hidden.shape[:2])

    return losses


def token_losses(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of `targets` [N] under `head` at the rows of `hidden` [N, width]: float32 [N].

    The rows go through the head in chunks, so memory does not grow with N times the vocabulary.
    """
    rows = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    losses = []
    for start in range(0, hidden.shape[0], rows):
        # in half precision, a sum over the vocabulary would be rounded too coarsely
        logits = head(hidden[start : start + rows]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets[start : start + rows], reduction="none"))
    return torch.cat(losses)


def summed_loss(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood of `targets` [N] at the rows of `hidden` [N, width]: float32 scalar.

    For training: gradients flow to `hidden`, and to the head if it is trained. Never more than one chunk of logits is
    in memory, forwards or backwards. torch's own `linear_cross_entropy` does the same, but with it a whole training
    step took 1.6 to 2.8 times as long on a CPU (width 512, vocabulary 32k).
    """
    # _FrozenHeadLoss reads the weight itself, which misses an adapter on the head, and gives the head no gradient
    if not is_plain(head) or any(p.requires_grad for p in head.parameters()):
        return _checkpointed_loss(head, hidden, targets)
    return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets)


def summed_loss_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss as `summed_loss` does, from full logits [N, vocabulary] that a model changed after its head."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def chunk_rows(vocabulary: int) -> int:
    """Return how many rows of logits are in memory at a time in training."""
    return max(1, TRAINING_CHUNK_BYTES // (4 * vocabulary))


def _checkpointed_loss(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed loss under a head that is trained or not plain, with the logits of one chunk at a time.

    The backward pass computes the logits of each chunk again instead of keeping them.
    """
    rows = chunk_rows(head.weight.shape[0])
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        # the reentrant variant gives the head no gradient if `hidden` needs none
        total = total + torch.utils.checkpoint.checkpoint(
            lambda x, t: summed_loss_of_logits(head(x), t), states, wanted, use_reentrant=False
        )
    return total


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum the loss under a head that is not trained.

    The gradient of `hidden` is (softmax - one-hot target) @ weight. The forward pass computes it as long as a
    chunk's logits are there, so the backward pass needs only [N, width] and computes no logits again.
    """

    @staticmethod
    def forward(
        ctx: BackwardCFunction,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        rows = chunk_rows(weight.shape[0])
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part, wanted = slice(start, start + rows), targets[start : start + rows, None]
            # a linear layer needs one dtype, and the sums below need float32
            logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()
            picked = logits.gather(1, wanted)  # a copy: the next lines overwrite the logits
            peak = logits.amax(1, keepdim=True)  # subtracted, so that exp cannot overflow
            mass = logits.sub_(peak).exp_().sum(1, keepdim=True)
            total += (mass.log() + peak - picked).sum()
            if not ctx.needs_input_grad[0]:  # a validation loss
                continue
            # in place: a second tensor of the chunk's size would double the memory
            probabilities = logits.div_(mass).scatter_add_(1, wanted, -torch.ones_like(picked))
            gradient[part] = torch.mm(probabilities.to(weight.dtype), weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: BackwardCFunction, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # `upstream`, a scalar, is the gradient of the sum, which the forward pass took as 1; only `hidden` gets any
        return gradient * upstream.to(gradient.dtype), None, None, None


@torch.no_grad()
def score(
    head: nn.Linear, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-likelihood of tokens, and whether each is the likeliest: (float32 [P], bool [P]).

    The vocabulary is read in tiles, with a running logarithm of the summed exponentials (Milakov & Gimelshein 2018,
    arXiv:1805.02867). If the head is more than a weight and a bias (it has an adapter or is quantized), the module
    itself runs on chunks of rows.

    Args:
        head: the output layer.
        hidden: states before the head, [N, width].
        rows: the row of `hidden` that predicts each token, [P]; several tokens may share a row.
        targets: the tokens, [P].
    """
    if not is_plain(head):
        return _score_by_rows(lambda part: head(part), hidden, rows, targets)
    if hidden.shape[0] == 0:  # the width of a GPU's tile is found by dividing by the number of rows
        return hidden.new_zeros(0, dtype=torch.float32), rows.new_zeros(0, dtype=torch.bool)
    order = torch.argsort(targets)  # the targets in one tile of the vocabulary are then a slice
    found, greedy = _score_by_tiles(head.weight, head.bias, hidden.to(head.weight.dtype), rows[order], targets[order])
    back = torch.argsort(order)
    return found[back], greedy[back]


def is_plain(head: nn.Module) -> bool:
    """Return whether `head` computes weight @ x + bias and nothing else, so that its weight may be read directly."""
    # the exact type: LoRA and quantized layers are subclasses or wrappers, and their `weight` is not what they apply
    return type(head) is torch.nn.Linear and not library_compat.is_hooked(head) and head.weight.is_floating_point()


def score_logits(logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same as `score`, from full logits [N, vocabulary] that a model changed after its head."""
    return _score_by_rows(lambda part: part, logits, rows, targets)


def _score_by_rows(
    apply: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score chunks of consecutive `states`; `apply` gives the logits of a chunk."""
    order = torch.argsort(rows)  # the targets of consecutive states are then a slice
    rows, targets = rows[order], targets[order]
    size = None
    found, greedy, start = [], [], 0
    while start < len(states):
        size = size or 1  # one row at first: only its logits show the size of the vocabulary
        logits = apply(states[start : start + size]).float()
        low, high = torch.searchsorted(rows, torch.tensor([start, start + size], device=rows.device)).tolist()
        local, target = rows[low:high] - start, targets[low:high]
        found.append(logits[local, target] - logits.logsumexp(-1)[local])
        greedy.append(logits.argmax(-1)[local] == target)
        start += size
        size = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    back = torch.argsort(order)
    return torch.cat(found)[back], torch.cat(greedy)[back]


def _score_by_tiles(
    weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score ascending `targets` in one pass over tiles of the vocabulary.

    Logits and their sums are in bits: on a CPU, 2**x takes 0.6 of the time of e**x, which is most of the time spent
    here besides the matrix products.
    """
    count, vocabulary = hidden.shape[0], weight.shape[0]
    # The states are fewer than the logits, so they are scaled. In half precision this would round them once more, so
    # there the float32 logits are scaled.
    scaled = weight.dtype == torch.float32
    if scaled:
        hidden, bias = hidden * BITS, None if bias is None else bias * BITS
    width = CPU_TILE if hidden.device.type == "cpu" else max(256, GPU_TILE_VALUES // count)
    edges = torch.arange(0, vocabulary + width, width).clamp(max=vocabulary)  # the last tile may be narrower
    # all positions at once: each transfer to the CPU makes it wait for the GPU
    bounds = torch.searchsorted(targets, edges.to(targets.device)).tolist()
    edges = edges.tolist()
    space = hidden.new_empty(count * width)  # one buffer for all tiles: a new one each time costs page faults
    peak = torch.full((count, 1), float("-inf"), device=hidden.device)  # the largest logit of each row so far
    total = torch.zeros(count, 1, device=hidden.device)  # the sum of 2**(logit - peak) of each row so far
    picked = torch.empty(len(targets), device=hidden.device)
    greedy = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
    for tile, (start, stop) in enumerate(itertools.pairwise(edges)):
        logits = torch.mm(hidden, weight[start:stop].T, out=space[: count * (stop - start)].view(count, -1))
        logits = logits.float() if bias is None else logits.add_(bias[start:stop]).float()
        logits = logits if scaled else logits.mul_(BITS)
        top = logits.amax(1, keepdim=True)
        here = slice(bounds[tile], bounds[tile + 1])
        if here.start < here.stop:
            # now, because the buffer is overwritten below
            picked[here] = logits[rows[here], targets[here] - start]
            greedy[here] = _first_of_all(logits, rows[here], targets[here] - start, top, peak)
        raised = torch.maximum(peak, top)
        # the sum so far was relative to the old peak
        total.mul_(torch.exp2(peak - raised)).add_(logits.sub_(raised).exp2_().sum(1, keepdim=True))
        peak = raised
    # an equal logit in a later tile does not beat a target, because its id is larger
    return (picked - (peak + total.log2())[rows, 0]) / BITS, greedy & (picked >= peak[rows, 0])


def _first_of_all(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, top: torch.Tensor, peak: torch.Tensor
) -> torch.Tensor:
    """Return whether each target has the largest logit so far; of equal logits the smallest id wins, as in argmax.

    logits: the tile, [N, tile]; rows, targets: indices into it, [P]; top: the tile's largest logit, [N, 1]; peak: the
    largest of all tiles before it, [N, 1].
    """
    value = logits[rows, targets]
    # greater than the peak, not equal: tiles before this one hold smaller ids
    first = (value >= top[rows, 0]) & (value > peak[rows, 0])
    able = first.nonzero()[:, 0]  # few targets are the largest, and only they need the slower argmax
    first[able] = logits[rows[able]].argmax(1) == targets[able]
    return first
