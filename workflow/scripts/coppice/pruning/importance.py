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

from coppice.pruning import anatomy


def magnitude(model, parts: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """L2 norm of all weights and biases of each structure: part -> one tensor [structures] a layer."""
    return {
        part: [
            anatomy.structure_sums(block, part, lambda tensor: _wide(tensor.detach()).square()).sqrt().cpu()
            for block in anatomy.blocks(model)
        ]
        for part in parts
    }


def taylor(
    model, parts: Sequence[str], batches: Sequence[torch.Tensor], layers_per_pass: int | None = None
) -> dict[str, list[torch.Tensor]]:
    """Sum over a structure's entries of |w * dL/dw|: part -> one tensor [structures] a layer.

    L is the mean next-token loss over all calibration tokens (labels are the inputs), so the division into
    batches does not matter. It estimates by how much L changes if an entry becomes 0. This is LLM-Pruner's
    element-wise first-order importance (Ma et al. 2023, arXiv:2305.11627, equation 5 without the Hessian term;
    `param_first` in its code), with a group's entries aggregated by sum.

    Only the gradients of `layers_per_pass` blocks (default: all) exist at once; the model is left without any.
    """
    layers = list(anatomy.blocks(model))
    size = layers_per_pass or len(layers)
    scores: dict[str, list[torch.Tensor]] = {part: [] for part in parts}
    for start in range(0, len(layers), size):
        chosen = layers[start : start + size]
        tensors = [c.tensor for block in chosen for part in parts for c in anatomy.couplings(block, part)]
        gradients = _loss_gradients(model, tensors, batches)
        for block in chosen:
            for part in parts:
                sums = anatomy.structure_sums(block, part, lambda w, g=gradients: (_wide(w.detach()) * g[w]).abs())
                scores[part].append(sums.cpu())
    return scores


def _loss_gradients(model, tensors: list[nn.Parameter], batches) -> dict[nn.Parameter, torch.Tensor]:
    """Gradient of the mean next-token loss over all batches, at least float32 also where the weights are not."""
    total_targets = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    gradients = {tensor: torch.zeros_like(tensor, dtype=_wide(tensor).dtype) for tensor in tensors}

    def take(tensor):  # as soon as autograd has it, so that the weights' own .grad never fills up
        gradients[tensor].add_(tensor.grad)
        tensor.grad = None

    with _calibrating(model), torch.enable_grad():
        for tensor in tensors:
            tensor.requires_grad_(True)
        hooks = [tensor.register_post_accumulate_grad_hook(take) for tensor in tensors]
        try:
            for batch in batches:
                batch = batch.to(model.get_input_embeddings().weight.device)
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                (loss * (batch.shape[0] * (batch.shape[1] - 1) / total_targets)).backward()
        finally:
            for hook in hooks:
                hook.remove()
    return gradients


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
    try:
        with _calibrating(model), torch.no_grad():
            for batch in batches:
                model.base_model(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return (sums / sum(batch.numel() for batch in batches)).float()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
