"""Set single weights of linear layers to zero, and with SparseGPT update the others.

Wanda and SparseGPT go through the model block by block, as their authors do: each block is pruned with the inputs that
reach it through the pruned blocks before it. `wanda-one-shot` takes the inputs of the dense model instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from coppice.core.errors import CheckpointError
from coppice.models.towers import Batch, Tower

from . import blockwise, grid, layer_inputs, sparsegpt
from .grid import Plan


def prune(tower: Tower, plan: Plan, batches: Sequence[Batch]) -> None:
    """Prune the linear layers of all blocks in place, by the importance, ratio and pattern of the plan."""
    {
        "magnitude": _by_magnitude,
        "wanda": _by_wanda,
        "wanda-one-shot": _by_wanda_in_one_shot,
        "sparsegpt": _by_sparsegpt,
    }[plan.settings["importance"]](tower, plan, batches)


def mask(scores: torch.Tensor, ratio: float, pattern: str | None) -> torch.Tensor:
    """Return a bool mask of the weights to zero: of equally low scores, those of lower index.

    Args:
        scores: [rows, columns]; the ratio holds in each row.
        ratio: share of each row to zero, rounded down as in the references: int(ratio * columns).
        pattern: "n:m" keeps the n highest scores of every m in a row; the ratio is then not used.
    """
    rows, columns = scores.shape
    if pattern:
        kept, of = grid.numbers_of(pattern)
        lowest = scores.view(rows, columns // of, of).argsort(dim=-1, stable=True)[..., : of - kept]
        zeroed = torch.zeros(rows, columns // of, of, dtype=torch.bool, device=scores.device)
    else:
        return _lowest(scores, int(columns * ratio))
    return zeroed.scatter_(-1, lowest, True).view(rows, columns)


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the `count` lowest scores of each row. Selecting the threshold is faster than sorting."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    missing = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def _by_magnitude(tower: Tower, plan: Plan, _batches: Sequence[Batch]) -> None:
    """Zero the smallest weights of each matrix or, with a pattern, of each group of a row."""
    for index, block in enumerate(tower.blocks):
        for linear in linears_of(block):
            scores = linear.weight.detach().abs().to(blockwise.wide_dtype(linear.weight))
            _check(scores, index)
            flat = scores if plan.settings["pattern"] else scores.view(1, -1)
            _zero(linear, mask(flat, plan.settings["ratio"], plan.settings["pattern"]).view_as(scores))


def _by_wanda(tower: Tower, plan: Plan, batches: Sequence[Batch]) -> None:
    """Zero the lowest products of weight and input norm of each row (Sun et al. 2023, arXiv:2306.11695)."""

    def visit(index: int, passes: blockwise.Passes) -> None:
        _zero_by_norms(layer_inputs.square_sums(linears_of(tower.blocks[index]), passes), plan, index)

    with blockwise.calibrating(tower.model):
        blockwise.visit_forwards(tower, batches, visit)


def _by_wanda_in_one_shot(tower: Tower, plan: Plan, batches: Sequence[Batch]) -> None:
    """Do the same, but with the norms of the dense model's inputs."""
    linears = [linear for block in tower.blocks for linear in linears_of(block)]
    with blockwise.calibrating(tower.model), torch.no_grad():
        sums = layer_inputs.square_sums(linears, [partial(tower.run, batch) for batch in batches])
    for index, block in enumerate(tower.blocks):
        _zero_by_norms({linear: sums[linear] for linear in linears_of(block)}, plan, index)


def _by_sparsegpt(tower: Tower, plan: Plan, batches: Sequence[Batch]) -> None:
    """Zero weights and update those that stay, so that each layer's outputs change least (see `sparsegpt`)."""

    def visit(index: int, passes: blockwise.Passes) -> None:
        for hessian, linears in layer_inputs.hessians(linears_of(tower.blocks[index]), passes):
            _check(hessian, index)
            dead, factor = sparsegpt.inverse_factor(hessian)
            for linear in linears:
                _check(linear.weight, index)
                with torch.no_grad():
                    weight = sparsegpt.pruned(
                        linear.weight, dead, factor, plan.settings["ratio"], plan.settings["pattern"]
                    )
                    linear.weight.copy_(weight)

    with blockwise.calibrating(tower.model):
        blockwise.visit_forwards(tower, batches, visit)


def linears_of(block: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a block, whose single weights are pruned."""
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def _zero_by_norms(sums: dict[nn.Linear, torch.Tensor], plan: Plan, index: int) -> None:
    """Zero weights of the layers of block `index`, from the sums of their squared inputs."""
    for linear, squares in sums.items():
        scores = linear.weight.detach().abs().to(blockwise.wide_dtype(linear.weight)) * squares.sqrt().float()
        _check(scores, index)
        _zero(linear, mask(scores, plan.settings["ratio"], plan.settings["pattern"]))


@torch.no_grad()
def _zero(linear: nn.Linear, zeroed: torch.Tensor) -> None:
    linear.weight.masked_fill_(zeroed, 0)


def _check(values: torch.Tensor, index: int) -> None:
    """Raise CheckpointError if a value is not finite: sorting a NaN would prune at random."""
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"pruning: weights or inputs of layer {index} are not finite, so the model's weights are damaged or "
            "overflow in this dtype. Load the model in bfloat16 or float32, or replace its weights."
        )
