"""Which tensors of a decoder block belong to one prunable structure, and how structures are cut out.

Llama, Qwen2, Qwen3 and Mistral share one anatomy. A structure of `mlp` is a channel: a row of `gate_proj` and
`up_proj` and a column of `down_proj`. A structure of `attention` is a KV group: one KV head with all its query
heads, which stand next to each other, so a run of rows of `q_proj`, `k_proj` and `v_proj` (with their biases)
and of columns of `o_proj`. Qwen3's `q_norm` and `k_norm` are per head_dim and belong to none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from coppice.core.errors import CheckpointError

LINEARS = {"mlp": ("gate_proj", "up_proj", "down_proj"), "attention": ("q_proj", "k_proj", "v_proj", "o_proj")}


class Coupling(NamedTuple):
    """A tensor that a part's structures run through: structure j is entries j*width ... (j+1)*width-1 along dim."""

    owner: nn.Linear
    name: str
    dim: int
    width: int

    @property
    def tensor(self) -> nn.Parameter:
        return getattr(self.owner, self.name)


def blocks(model) -> nn.ModuleList:
    """The decoder blocks of a causal language model."""
    return model.base_model.layers


def module_of(block, part: str) -> nn.Module:
    return block.mlp if part == "mlp" else block.self_attn


def linears(block, part: str) -> list[nn.Linear]:
    return [getattr(module_of(block, part), name) for name in LINEARS[part]]


def couplings(block, part: str) -> Iterator[Coupling]:
    """Every tensor of the block that the part's structures run through, the last linear layer by its columns."""
    *by_rows, by_columns = linears(block, part)
    widths = _row_widths(block, part)
    for linear, width in zip(by_rows, widths, strict=True):
        yield Coupling(linear, "weight", 0, width)
        if linear.bias is not None:
            yield Coupling(linear, "bias", 0, width)
    yield Coupling(by_columns, "weight", 1, widths[0])  # a column for each row of gate_proj, or of q_proj


def _row_widths(block, part: str) -> list[int]:
    if part == "mlp":
        return [1, 1]
    attention = block.self_attn
    return [attention.head_dim * attention.num_key_value_groups, attention.head_dim, attention.head_dim]


def count(block, part: str) -> int:
    """How many structures of this part the block has: channels, or KV groups."""
    first = next(couplings(block, part))
    return first.tensor.shape[first.dim] // first.width


def structure_sums(block, part: str, value: Callable[[nn.Parameter], torch.Tensor]) -> torch.Tensor:
    """Sum of `value(tensor)` (same shape as the tensor) over all entries of each structure: [count]."""
    total = 0
    for coupling in couplings(block, part):
        values = value(coupling.tensor)
        along = values if values.dim() == 1 else values.sum(dim=1 - coupling.dim)
        total = total + along.view(-1, coupling.width).sum(dim=1)
    return total


@torch.no_grad()
def keep(block, part: str, structures: torch.Tensor) -> None:
    """Cut the block down to these structures (indices, ascending), in place: each linear layer stays the same
    module, so hooks and device placement stay with it, and `num_key_value_groups` is as it was, since a group
    goes with all its query heads."""
    for coupling in list(couplings(block, part)):
        old = coupling.tensor
        entries = (structures[:, None] * coupling.width + torch.arange(coupling.width)).flatten().to(old.device)
        new = nn.Parameter(old.index_select(coupling.dim, entries), requires_grad=old.requires_grad)
        setattr(coupling.owner, coupling.name, new)
    for linear in linears(block, part):
        linear.out_features, linear.in_features = linear.weight.shape
    if part == "mlp":
        block.mlp.intermediate_size = len(structures)


def check(model) -> None:
    """Refuse a model that this package would prune wrongly; CheckpointError says why and what to do."""
    config, name = model.config, model.config.name_or_path or type(model).__name__
    if len(blocks(model)) != config.num_hidden_layers:
        raise CheckpointError(
            f"{name}: the configuration has {config.num_hidden_layers} layers, the model {len(blocks(model))}"
        )
    expected = {"mlp": config.intermediate_size, "attention": config.num_key_value_heads}
    for index, block in enumerate(blocks(model)):
        for part, size in expected.items():
            for linear, linear_name in zip(linears(block, part), LINEARS[part], strict=True):
                if type(linear) is not nn.Linear or linear.weight.is_meta:
                    raise CheckpointError(
                        f"{name}: layer {index}'s {linear_name} is a {type(linear).__name__}"
                        f"{' without data (offloaded)' if type(linear) is nn.Linear else ''}, which cannot be cut; "
                        "load the model unquantised, without adapter and wholly on its devices"
                    )
            if count(block, part) != size:
                raise CheckpointError(
                    f"{name}: layer {index} has {count(block, part)} {part} structures, the configuration says {size}; "
                    "a model whose layers differ already cannot be pruned to an ordinary checkpoint"
                )
