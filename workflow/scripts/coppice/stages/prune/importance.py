"""Importance of structures: magnitude, Taylor and activation; and of blocks: influence, distance, perplexity, Taylor.

All scores are float32 or wider, lie on the CPU and depend on nothing but the model and the batches (see
`models.towers.Batch`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from coppice.core.aliases import Record
from coppice.models.towers import Batch, BlockOutput, Tower

from . import anatomy, blockwise, layer_inputs

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


def magnitude(tower: Tower, parts: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """Return the L2 norm of all weights and biases of each structure: part -> one tensor [structures] per layer."""
    return {
        part: [
            anatomy.structure_sums(block, tower.parts[part], lambda tensor: _wide(tensor.detach()).square())
            .sqrt()
            .cpu()
            for block in tower.blocks
        ]
        for part in parts
    }


def taylor(
    tower: Tower, parts: Sequence[str], batches: Sequence[Batch], form: str = "taylor"
) -> dict[str, list[torch.Tensor]]:
    """Sum the Taylor estimate of each entry over each structure: part -> one tensor [structures] per layer.

    L is the mean next-token loss over all calibration tokens, so the division into batches does not matter. Each term
    estimates how much L changes if that entry w becomes 0. This is LLM-Pruner's element-wise importance (Ma et al.
    2023, arXiv:2305.11627, equation 5), summed over the entries of a group:

    - "taylor": |w g|, with g = dL/dw; `param_first` in its code.
    - "taylor-second": |w^2 h|, with h the mean over the sequences of their squared gradients; `param_second`.
    - "taylor-mixed": |w g - w^2 h / 2|; `param_mix`, the default of its code.

    Only one block's gradients exist at a time (see `blockwise`), and none are left on the model.
    """
    scores: dict[str, list] = {part: [None] * len(tower.blocks) for part in parts}
    squares = form != "taylor"

    def tensors_of(block: nn.Module) -> list[nn.Parameter]:
        return [c.tensor for part in parts for c in tower.parts[part].couplings(block) if c.scored]

    def visit(index: int, gradients: blockwise.Gradients) -> None:
        for part in parts:
            sums = anatomy.structure_sums(
                tower.blocks[index], tower.parts[part], lambda w: _estimate(w, gradients, form)
            )
            scores[part][index] = sums.cpu()

    examples = [row for batch in batches for row in tower.rows(batch)] if squares else batches
    with blockwise.calibrating(tower.model):
        blockwise.visit_gradients(tower, examples, tensors_of, visit, squares)
    return scores


def _estimate(weight: nn.Parameter, gradients: blockwise.Gradients, form: str) -> torch.Tensor:
    """Return the estimates of all entries of a weight."""
    wide = _wide(weight.detach())
    if form == "taylor":
        return (wide * gradients.mean[weight]).abs()
    second = wide.square() * gradients.squared[weight]
    return second if form == "taylor-second" else (wide * gradients.mean[weight] - second / 2).abs()


def block_taylor(tower: Tower, batches: Sequence[Batch]) -> torch.Tensor:
    """Sum |w * dL/dw| over all weights of each block, those of norms included: [layers].

    This is the Taylor criterion of Shortened LLaMA (Kim et al. 2024, arXiv:2402.02834).
    """
    scores = torch.zeros(len(tower.blocks), dtype=torch.float64)

    def tensors_of(block: nn.Module) -> list[nn.Parameter]:
        return [tensor for name, tensor in block.named_parameters() if name.endswith("weight")]

    def visit(index: int, gradients: blockwise.Gradients) -> None:
        scores[index] = sum(_estimate(w, gradients, "taylor").sum(dtype=torch.float64).cpu() for w in gradients.mean)

    with blockwise.calibrating(tower.model):
        blockwise.visit_gradients(tower, batches, tensors_of, visit)
    return scores.float()


def block_perplexities(tower: Tower, batches: Sequence[Batch]) -> torch.Tensor:
    """Return the perplexity of the calibration text without each block in turn: [layers].

    This is the perplexity criterion of Shortened LLaMA (Kim et al. 2024, arXiv:2402.02834).
    """
    with blockwise.calibrating(tower.model):
        losses = sum(blockwise.losses_without(tower, batch) for batch in batches)
    return (losses / sum(tower.targets(batch) for batch in batches)).exp()


def activation(tower: Tower, parts: Sequence[str], batches: Sequence[Batch]) -> dict[str, list[torch.Tensor]]:
    """Sum |w| * ||x|| over each structure's columns of the part's last linear layer: part -> [structures] per layer.

    ||x|| is the L2 norm of the column's input over all calibration tokens. This is Wanda's score of single weights (Sun
    et al. 2023, arXiv:2306.11695), summed over the weights that a structure feeds, as FLAP's authors do for Wanda-sp.
    """
    lasts = {part: [tower.parts[part].linears_of(block)[-1] for block in tower.blocks] for part in parts}
    passes = [partial(tower.run, batch) for batch in batches]
    with blockwise.calibrating(tower.model), torch.no_grad():
        sums = layer_inputs.square_sums([linear for part in parts for linear in lasts[part]], passes)
    scores: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        scores[part] = []
        for block, linear in zip(tower.blocks, lasts[part], strict=True):
            columns = (_wide(linear.weight.detach()).abs() * sums[linear].sqrt().float()).sum(0)
            scores[part].append(columns.view(anatomy.count(block, tower.parts[part]), -1).sum(1).cpu())
    return scores


def block_distances(tower: Tower, batches: Sequence[Batch], span: int = 1, angular: bool = False) -> torch.Tensor:
    """Return how far each run of `span` consecutive blocks moves the hidden state: [layers - span + 1], by first block.

    With x the input of a run and y its output, this is the mean over all calibration tokens of 1 - cos(x, y), the block
    influence (ShortGPT, Men et al. 2024, arXiv:2403.03853), or with `angular` of arccos(cos(x, y)) / pi, the angular
    distance (Gromov et al. 2024, arXiv:2403.17887). Gromov et al. use only the last token of each sequence; this uses
    all tokens, because calibration sets are small.

    Forward hooks reduce each block's states to a sum immediately, so at most `span` hidden states are held at a time.
    """
    layers = tower.blocks
    sums = torch.zeros(len(layers) - span + 1, dtype=torch.float64)
    inputs: deque[torch.Tensor] = deque(maxlen=span)

    def hook_for(index: int) -> Callable[..., None]:
        def hook(_block: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Record, output: BlockOutput) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])
            output = output[0] if isinstance(output, tuple) else output
            if index >= span - 1:
                start = inputs[0].to(output.device)
                cosine = F.cosine_similarity(_wide(start), _wide(output), dim=-1)
                distance = cosine.clamp(-1, 1).arccos() / math.pi if angular else 1 - cosine
                sums[index - span + 1] += distance.double().sum().item()

        return hook

    hooks = [layer.register_forward_hook(hook_for(i), with_kwargs=True) for i, layer in enumerate(layers)]
    _run_hooked(tower, batches, hooks)
    return (sums / sum(tower.tokens(batch) for batch in batches)).float()


def _run_hooked(tower: Tower, batches: Iterable[Batch], hooks: Iterable[RemovableHandle]) -> None:
    """Run the tower on all batches, then remove the hooks."""
    try:
        with blockwise.calibrating(tower.model), torch.no_grad():
            for batch in batches:
                tower.run(batch)
    finally:
        for hook in hooks:
            hook.remove()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(blockwise.wide_dtype(tensor))
