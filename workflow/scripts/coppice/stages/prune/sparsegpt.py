"""Prune one linear layer by SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774, Algorithm 1).

Columns are pruned from left to right. After each, the columns to its right take up the error that it leaves in the
layer's outputs. Within a block of columns they are updated at once, all others after the block.
"""

from __future__ import annotations

import torch

from . import grid

COLUMNS = 128  # columns in a block: the mask is chosen, and later columns are updated, once for each
DAMPENING = 0.01  # share of the Hessian's mean diagonal that is added to its diagonal


def inverse_factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the dead columns, bool [columns], and the upper Cholesky factor U of the dampened inverse: H^-1 = U^T U.

    Args:
        hessian: [columns, columns] (see `layer_inputs.hessians`); it is overwritten. A column that is always 0 is dead:
            its weights have no effect and become 0.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += DAMPENING * diagonal.mean()
    return dead, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def pruned(
    weight: torch.Tensor, dead: torch.Tensor, factor: torch.Tensor, ratio: float, pattern: str | None
) -> torch.Tensor:
    """Return the pruned and updated weights, in the dtype of `factor`.

    Args:
        weight: [rows, columns], on the device of `factor`.
        dead: columns without effect, bool [columns].
        factor: of `inverse_factor`.
        ratio: share of the weights that become 0, in each block of columns.
        pattern: "n:m" keeps n of every m weights in a row instead.
    """
    weight = weight.to(factor.dtype, copy=True)
    weight[:, dead] = 0
    kept, of = grid.numbers_of(pattern) if pattern else (0, 1)
    width = max(1, COLUMNS // of) * of  # no group of a pattern extends over two blocks
    for first in range(0, weight.shape[1], width):
        columns = slice(first, min(first + width, weight.shape[1]))
        later = slice(columns.stop, None)
        own = factor[columns, columns]
        block, scale = weight[:, columns], own.diagonal().square()
        zeroed = torch.zeros_like(block, dtype=torch.bool) if pattern else _lowest(block.square() / scale, ratio)
        errors = torch.zeros_like(block)
        for i in range(block.shape[1]):
            if pattern and i % of == 0:
                scores = block[:, i : i + of].square() / scale[i : i + of]
                zeroed[:, i : i + of].scatter_(1, scores.argsort(dim=1, stable=True)[:, : of - kept], True)
            error = torch.where(zeroed[:, i], block[:, i], 0) / own[i, i]
            block[:, i:].addr_(error, own[i, i:], alpha=-1)
            errors[:, i] = error
        block[zeroed] = 0  # the updates leave what rounding leaves
        weight[:, later] -= errors @ factor[columns, later]
    return weight


def _lowest(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return a mask of the scores up to the one at place int(ratio * number), as in the authors' code."""
    flat = scores.flatten()
    return scores <= flat.sort().values[int(flat.numel() * ratio)]
