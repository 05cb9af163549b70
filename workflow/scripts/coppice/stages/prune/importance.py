"""How much a structure matters: magnitude, first-order Taylor, block influence, angular distance.

All values are at least float32, on the CPU, and deterministic given the batches (LongTensor [B, T], no padding).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from . import anatomy, blockwise


def magnitude(model, parts: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """L2 norm of all weights and biases of each structure: part -> one tensor [structures] a layer."""
    return {
        part: [
            anatomy.structure_sums(block, part, lambda tensor: _wide(tensor.detach()).square()).sqrt().cpu()
            for block in anatomy.blocks(model)
        ]
        for part in parts
    }


def taylor(model, parts: Sequence[str], batches: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Sum over a structure's entries of |w * dL/dw|: part -> one tensor [structures] a layer.

    L is the mean next-token loss over all calibration tokens (labels are the inputs), so the division into
    batches does not matter. It estimates by how much L changes if an entry becomes 0. This is LLM-Pruner's
    element-wise first-order importance (Ma et al. 2023, arXiv:2305.11627, equation 5 without the Hessian term;
    `param_first` in its code), with a group's entries aggregated by sum.

    One block's gradients exist at a time (`blockwise`); the model is left without any.
    """
    scores: dict[str, list] = {part: [None] * len(anatomy.blocks(model)) for part in parts}

    def tensors_of(block):
        return [coupling.tensor for part in parts for coupling in anatomy.couplings(block, part)]

    def visit(index, gradients):
        for part in parts:
            sums = anatomy.structure_sums(
                anatomy.blocks(model)[index], part, lambda w: (_wide(w.detach()) * gradients[w]).abs()
            )
            scores[part][index] = sums.cpu()

    with _calibrating(model):
        blockwise.visit_gradients(model, batches, tensors_of, visit)
    return scores


def activation(model, parts: Sequence[str], batches: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Sum over a structure's columns of the part's last linear layer of |w| * ||x||: part -> [structures] a layer.

    ||x|| is the L2 norm of the column's input over all calibration tokens: Wanda's measure (Sun et al. 2023,
    arXiv:2306.11695) of single weights, summed up for the structure that feeds them, as FLAP's authors do for Wanda-sp.
    """
    lasts = {part: [anatomy.linears(block, part)[-1] for block in anatomy.blocks(model)] for part in parts}
    norms = column_norms(model, [linear for part in parts for linear in lasts[part]], batches)
    scores: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        scores[part] = []
        for block, linear in zip(anatomy.blocks(model), lasts[part], strict=True):
            columns = (_wide(linear.weight.detach()).abs() * norms[linear].to(linear.weight.device)).sum(0)
            scores[part].append(columns.view(anatomy.count(block, part), -1).sum(1).cpu())
    return scores


def column_norms(model, linears: Sequence[nn.Linear], batches: Sequence[torch.Tensor]) -> dict[nn.Linear, torch.Tensor]:
    """L2 norm of each input column of linear layers over all calibration tokens: [in_features], at least float32."""
    sums = {linear: torch.zeros(linear.in_features, dtype=torch.float64) for linear in linears}

    def add(linear, args):
        sums[linear] += _wide(args[0]).flatten(0, -2).square().sum(0).double().cpu()

    _run_hooked(model, batches, [linear.register_forward_pre_hook(add) for linear in linears])
    return {linear: total.sqrt().float() for linear, total in sums.items()}


def block_distances(model, batches: Sequence[torch.Tensor], span: int = 1, angular: bool = False) -> torch.Tensor:
    """How far each run of `span` consecutive blocks moves the hidden state: [layers - span + 1], by first block.

    With x a run's input and y its output, the mean over all calibration tokens of
    1 - cos(x, y): block influence (ShortGPT, Men et al. 2024, arXiv:2403.03853), or with `angular` of
    arccos(cos(x, y)) / pi: angular distance (Gromov et al. 2024, arXiv:2403.17887; they take the last token of
    each sequence, here all are taken, because calibration sets are small).

    Forward hooks reduce each block's states to a sum at once; no more than `span` hidden states are held.
    """
    layers = anatomy.blocks(model)
    sums = torch.zeros(len(layers) - span + 1, dtype=torch.float64)
    inputs: deque[torch.Tensor] = deque(maxlen=span)

    def hook_for(index):
        def hook(_block, args, kwargs, output):
            inputs.append(args[0] if args else kwargs["hidden_states"])
            output = output[0] if isinstance(output, tuple) else output
            if index >= span - 1:
                start = inputs[0].to(output.device)
                cosine = F.cosine_similarity(_wide(start), _wide(output), dim=-1)
                distance = cosine.clamp(-1, 1).arccos() / math.pi if angular else 1 - cosine
                sums[index - span + 1] += distance.double().sum().item()

        return hook

    hooks = [layer.register_forward_hook(hook_for(i), with_kwargs=True) for i, layer in enumerate(layers)]
    _run_hooked(model, batches, hooks)
    return (sums / sum(batch.numel() for batch in batches)).float()


def _run_hooked(model, batches, hooks):
    """Run the decoder on all batches, and remove the hooks that have watched it."""
    try:
        with _calibrating(model), torch.no_grad():
            for batch in batches:
                model.base_model(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return tensor.to(blockwise.wide_dtype(tensor))


@contextmanager
def _calibrating(model) -> Iterator[None]:
    """No dropout and no gradients but those asked for inside; afterwards as before, without any gradient."""
    training = model.training
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        model.train(training)
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        model.zero_grad(set_to_none=True)
