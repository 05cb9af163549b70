"""Cut structures out of the blocks of a tower, and sum values over them (see `models.towers`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from coppice.core.errors import CheckpointError
from coppice.models.towers import Part, Tower


def count(block: nn.Module, part: Part) -> int:
    """Return the number of structures of this part in the block: channels, or KV groups."""
    first = next(part.couplings(block))
    return first.tensor.shape[first.dim] // first.width


def structure_sums(block: nn.Module, part: Part, value: Callable[[nn.Parameter], torch.Tensor]) -> torch.Tensor:
    """Sum `value(tensor)`, which has the tensor's shape, over all entries of each structure: [count]."""
    total = 0
    for coupling in part.couplings(block):
        if not coupling.scored:
            continue
        values = value(coupling.tensor)
        along = values if values.dim() == 1 else values.sum(dim=1 - coupling.dim)
        total = total + along.view(-1, coupling.width).sum(dim=1)
    return total


@torch.no_grad()
def keep(block: nn.Module, part: Part, structures: torch.Tensor) -> None:
    """Cut the block down to these structures, in place.

    Each linear layer stays the same module and keeps its hooks and device placement.

    Args:
        block: a block of a tower.
        part: which structures of the block.
        structures: ascending indices of the structures to keep, LongTensor on the CPU.
    """
    for coupling in list(part.couplings(block)):
        old = coupling.tensor
        entries = (structures[:, None] * coupling.width + torch.arange(coupling.width)).flatten().to(old.device)
        new = nn.Parameter(old.index_select(coupling.dim, entries), requires_grad=old.requires_grad)
        setattr(coupling.owner, coupling.name, new)
    part.resized(block, len(structures))


def check(tower: Tower) -> None:
    """Raise CheckpointError if this package would prune the tower wrongly."""
    name = tower.model.config.name_or_path or type(tower.model).__name__
    if len(tower.blocks) != tower.anatomy.blocks:
        raise CheckpointError(
            f"{name}: the configuration has {tower.anatomy.blocks} layers, but the model has "
            f"{len(tower.blocks)}. Restore the checkpoint's own config.json."
        )
    for index, block in enumerate(tower.blocks):
        for part_name, part in tower.parts.items():
            for linear, linear_name in zip(part.linears_of(block), part.linears, strict=True):
                if type(linear) is not nn.Linear or linear.weight.is_meta:
                    raise CheckpointError(
                        f"{name}: in layer {index}, {linear_name} is a {type(linear).__name__}"
                        f"{' without data (offloaded)' if type(linear) is nn.Linear else ''}, which cannot be pruned. "
                        "Load the model without quantization, adapter or offloading."
                    )
            if count(block, part) != part.count(tower.config):
                raise CheckpointError(
                    f"{name}: layer {index} has {count(block, part)} {part_name} structures, but the configuration "
                    f"says {part.count(tower.config)}. A model whose layers already differ cannot be pruned again; "
                    "prune the original model."
                )
