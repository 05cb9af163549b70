"""The output layer of a causal language model, applied only where a token is predicted, and in chunks.

The full `[batch, length, vocabulary]` logits of a 128k-vocabulary model are the largest tensor of an evaluation by far,
and most of it is never looked at. Here the body gives hidden states, and the head is applied to the rows asked for.
"""

import itertools
import logging
import math

import torch
import torch.utils.checkpoint

logger = logging.getLogger("coppice.output_layer")

CHUNK_BYTES = 64 * 2**20  # float32 logits held at a time
TRAINING_CHUNK_BYTES = 256 * 2**20  # matrix products are 13 % faster with 512 rows of a 128k vocabulary than with 128
CPU_TILE = 1024  # tokens of the vocabulary at a time: measured, with a thousand rows what stays in cache
GPU_TILE_VALUES = 2**26
BITS = 1 / math.log(2)  # in one unit of a natural logarithm


def causal_lm(model):
    """The causal LM itself, without the adapter's wrapper (whose LoRA layers stay in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parts(model):
    """(body, head) of `model`, where head(body(ids)) gives its logits; (None, None) where it does more than that.

    Some architectures scale or cap their logits after the head: a probe of a few tokens finds out.
    """
    causal = causal_lm(model)
    body, head = causal.base_model, causal.get_output_embeddings()
    if head is None or body is causal:
        return None, None
    training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = head(body(input_ids=ids, use_cache=False).last_hidden_state)
    model.train(training)
    if not torch.allclose(expected.float(), found.float(), rtol=1e-3, atol=1e-3):
        logger.warning("%s changes its logits after the output layer: full logits are computed", type(causal).__name__)
        return None, None
    return body, head


def token_losses(head, hidden, targets):
    """Negative log-likelihood of `targets` [N] under `head` at the rows of `hidden` [N, width]: float32 [N].

    Computed in chunks of rows, so that memory does not grow with the vocabulary times N.
    """
    rows = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    losses = []
    for start in range(0, hidden.shape[0], rows):
        logits = head(hidden[start : start + rows]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets[start : start + rows], reduction="none"))
    return torch.cat(losses)


def summed_loss(head, hidden, targets):
    """Summed negative log-likelihood of `targets` [N] under `head` at the rows of `hidden` [N, width]: float32 scalar.

    For training: gradients flow to `hidden`, and to the head where it is trained. No more than a chunk of logits is
    held, forwards or backwards. torch's own `linear_cross_entropy` does the same, but with it a whole training step
    took 1.6 to 2.8 times as long on a CPU (width 512, vocabulary 32k).
    """
    if not is_plain(head) or any(p.requires_grad for p in head.parameters()):
        return _checkpointed_loss(head, hidden, targets)
    return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets)


def summed_loss_of_logits(logits, targets):
    """As `summed_loss`, from the full logits [N, vocabulary] of a model that changes them after the head."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def _chunk_rows(vocabulary):
    return max(1, TRAINING_CHUNK_BYTES // (4 * vocabulary))


def _checkpointed_loss(head, hidden, targets):
    """By chunks of rows whose logits are computed once more in the backward pass: for heads that are trained."""
    rows = _chunk_rows(head.weight.shape[0])
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(
            lambda x, t: summed_loss_of_logits(head(x), t), states, wanted, use_reentrant=False
        )
    return total


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss under a head that is not trained; the gradient of `hidden` is softmax minus target, times the weight."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        rows = _chunk_rows(weight.shape[0])
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part, wanted = slice(start, start + rows), targets[start : start + rows, None]
            logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()
            picked = logits.gather(1, wanted)
            peak = logits.amax(1, keepdim=True)
            mass = logits.sub_(peak).exp_().sum(1, keepdim=True)
            total += (mass.log() + peak - picked).sum()
            if not ctx.needs_input_grad[0]:  # a validation loss
                continue
            probabilities = logits.div_(mass).scatter_add_(1, wanted, -torch.ones_like(picked))
            gradient[part] = torch.mm(probabilities.to(weight.dtype), weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


@torch.no_grad()
def score(head, hidden, rows, targets):
    """Log-likelihood of tokens, and whether each is the likeliest: (float32 [P], bool [P]).

    hidden [N, width]: states before the head; rows [P]: the row of `hidden` that predicts each token, targets [P].
    Several tokens may be asked of one row. The vocabulary is gone through in tiles, with the logarithm of the summed
    exponentials carried along (Milakov & Gimelshein 2018, arXiv:1805.02867); where the head is more than a weight and
    a bias (an adapter on it, a quantised one), the module itself is called on chunks of rows.
    """
    if not is_plain(head):
        return _score_by_rows(lambda part: head(part), hidden, rows, targets)
    if hidden.shape[0] == 0:
        return hidden.new_zeros(0, dtype=torch.float32), rows.new_zeros(0, dtype=torch.bool)
    order = torch.argsort(targets)
    found, greedy = _score_by_tiles(head.weight, head.bias, hidden.to(head.weight.dtype), rows[order], targets[order])
    back = torch.argsort(order)
    return found[back], greedy[back]


def is_plain(head):
    """Whether `head` computes weight @ x + bias and nothing else, so that its weight can be read in its place."""
    hooked = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
    return type(head) is torch.nn.Linear and not hooked and head.weight.is_floating_point()


def score_logits(logits, rows, targets):
    """As `score`, from full logits [N, vocabulary]: for models that change their logits after the head."""
    return _score_by_rows(lambda part: part, logits, rows, targets)


def _score_by_rows(apply, states, rows, targets):
    """Score chunks of consecutive `states`, to each of which `apply` gives logits."""
    order = torch.argsort(rows)
    rows, targets = rows[order], targets[order]
    size = None
    found, greedy, start = [], [], 0
    while start < len(states):
        size = size or 1
        logits = apply(states[start : start + size]).float()
        low, high = torch.searchsorted(rows, torch.tensor([start, start + size], device=rows.device)).tolist()
        local, target = rows[low:high] - start, targets[low:high]
        found.append(logits[local, target] - logits.logsumexp(-1)[local])
        greedy.append(logits.argmax(-1)[local] == target)
        start += size
        size = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    back = torch.argsort(order)
    return torch.cat(found)[back], torch.cat(greedy)[back]


def _score_by_tiles(weight, bias, hidden, rows, targets):
    """`score` for ascending `targets`: one pass over tiles of the vocabulary.

    Logits and what is summed of them are in bits: on a CPU 2**x takes 0.6 of the time of e**x, which is most of what
    is spent here beside the products. In float32 the states are scaled, in half precision the wider logits.
    """
    count, vocabulary = hidden.shape[0], weight.shape[0]
    scaled = weight.dtype == torch.float32
    if scaled:
        hidden, bias = hidden * BITS, None if bias is None else bias * BITS
    width = CPU_TILE if hidden.device.type == "cpu" else max(256, GPU_TILE_VALUES // count)
    edges = torch.arange(0, vocabulary + width, width).clamp(max=vocabulary)
    bounds = torch.searchsorted(targets, edges.to(targets.device)).tolist()
    edges = edges.tolist()
    space = hidden.new_empty(count * width)
    peak = torch.full((count, 1), float("-inf"), device=hidden.device)
    total = torch.zeros(count, 1, device=hidden.device)
    picked = torch.empty(len(targets), device=hidden.device)
    greedy = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
    for tile, (start, stop) in enumerate(itertools.pairwise(edges)):
        logits = torch.mm(hidden, weight[start:stop].T, out=space[: count * (stop - start)].view(count, -1))
        logits = logits.float() if bias is None else logits.add_(bias[start:stop]).float()
        logits = logits if scaled else logits.mul_(BITS)
        top = logits.amax(1, keepdim=True)
        here = slice(bounds[tile], bounds[tile + 1])
        if here.start < here.stop:
            picked[here] = logits[rows[here], targets[here] - start]
            greedy[here] = _first_of_all(logits, rows[here], targets[here] - start, top, peak)
        raised = torch.maximum(peak, top)
        total.mul_(torch.exp2(peak - raised)).add_(logits.sub_(raised).exp2_().sum(1, keepdim=True))
        peak = raised
    return (picked - (peak + total.log2())[rows, 0]) / BITS, greedy & (picked >= peak[rows, 0])


def _first_of_all(logits, rows, targets, top, peak):
    """Whether each target has the largest logit so far, and no smaller id has the same: ties go as argmax has them.

    logits [N, tile]; rows, targets [P] into it; top [N, 1] is the tile's largest logit, peak that of the tiles before.
    """
    value = logits[rows, targets]
    first = (value >= top[rows, 0]) & (value > peak[rows, 0])
    able = first.nonzero()[:, 0]
    first[able] = logits[rows[able]].argmax(1) == targets[able]
    return first
