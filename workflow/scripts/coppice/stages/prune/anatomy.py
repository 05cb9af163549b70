"""The tensors of a decoder block that form one prunable structure, and how to cut structures out.

Llama, Qwen2, Qwen3 and Mistral share one anatomy. In `mlp`, a structure is a channel: one row of `gate_proj` and of
`up_proj`, and one column of `down_proj`. In `attention`, a structure is a KV group: one KV head with all its query
heads. The query heads of a group are adjacent, so a group is a run of rows of `q_proj`, `k_proj` and `v_proj` (with
their biases) and a run of columns of `o_proj`. Qwen3's `q_norm` and `k_norm` have one weight per position in a head and
are shared by all heads, so they belong to no structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from coppice.core.errors import CheckpointError

LINEARS = {"mlp": ("gate_proj", "up_proj", "down_proj"), "attention": ("q_proj", "k_proj", "v_proj", "o_proj")}


class Coupling(NamedTuple):
    """A tensor that holds a slice of every structure: structure j is entries j*width ... (j+1)*width-1 along `dim`."""

    owner: nn.Linear
    name: str
    dim: int
    width: int

    @property
    def tensor(self) -> nn.Parameter:
        return getattr(self.owner, self.name)


def blocks(model) -> nn.ModuleList:
    """Return the decoder blocks of a causal language model."""
    return model.base_model.layers


def module_of(block, part: str) -> nn.Module:
    """Return the block's MLP or attention module."""
    return block.mlp if part == "mlp" else block.self_attn


def linears(block, part: str) -> list[nn.Linear]:
    """Return the part's linear layers in the order of `LINEARS`; the last one reads what the others produce."""
    return [getattr(module_of(block, part), name) for name in LINEARS[part]]


def couplings(block, part: str) -> Iterator[Coupling]:
    """Yield each tensor of the block that holds slices of the part's structures.

    Structures are rows of all the part's linear layers but the last, and columns of the last.
    """
    *by_rows, by_columns = linears(block, part)
    widths = _row_widths(block, part)
    for linear, width in zip(by_rows, widths, strict=True):
        yield Coupling(linear, "weight", 0, width)
        if linear.bias is not None:
            yield Coupling(linear, "bias", 0, width)
    # The last layer has one column per row of gate_proj or q_proj. Its bias belongs to its outputs, which stay.
    yield Coupling(by_columns, "weight", 1, widths[0])


def _row_widths(block, part: str) -> list[int]:
    if part == "mlp":
        return [1, 1]
    attention = block.self_attn
    return [attention.head_dim * attention.num_key_value_groups, attention.head_dim, attention.head_dim]


def count(block, part: str) -> int:
    """Return the number of structures of this part in the block: channels, or KV groups."""
    first = next(couplings(block, part))
    return first.tensor.shape[first.dim] // first.width


def structure_sums(block, part: str, value: Callable[[nn.Parameter], torch.Tensor]) -> torch.Tensor:
    """Sum `value(tensor)`, which has the tensor's shape, over all entries of each structure: [count]."""
    total = 0
    for coupling in couplings(block, part):
        values = value(coupling.tensor)
        along = values if values.dim() == 1 else values.sum(dim=1 - coupling.dim)
        total = total + along.view(-1, coupling.width).sum(dim=1)
    return total


@torch.no_grad()
def keep(block, part: str, structures: torch.Tensor) -> None:
    """Cut the block down to these structures, in place.

    Each linear layer stays the same module and keeps its hooks and device placement. `num_key_value_groups` does not
    change, because a KV group is removed with all its query heads.

    Args:
        block: a decoder block.
        part: "mlp" or "attention".
        structures: ascending indices of the structures to keep, LongTensor on the CPU.
    """
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
    """Raise CheckpointError if this package would prune the model wrongly."""
    config, name = model.config, model.config.name_or_path or type(model).__name__
    if len(blocks(model)) != config.num_hidden_layers:
        raise CheckpointError(
            f"{name}: the configuration has {config.num_hidden_layers} layers, but the model has "
            f"{len(blocks(model))}. Restore the checkpoint's own config.json."
        )
    expected = {"mlp": config.intermediate_size, "attention": config.num_key_value_heads}
    for index, block in enumerate(blocks(model)):
        for part, size in expected.items():
            for linear, linear_name in zip(linears(block, part), LINEARS[part], strict=True):
                if type(linear) is not nn.Linear or linear.weight.is_meta:
                    raise CheckpointError(
                        f"{name}: in layer {index}, {linear_name} is a {type(linear).__name__}"
                        f"{' without data (offloaded)' if type(linear) is nn.Linear else ''}, which cannot be pruned. "
                        "Load the model without quantization, adapter or offloading."
                    )
            if count(block, part) != size:
                raise CheckpointError(
                    f"{name}: layer {index} has {count(block, part)} {part} structures, but the configuration says "
                    f"{size}. A model whose layers already differ cannot be pruned again; prune the original model."
                )
