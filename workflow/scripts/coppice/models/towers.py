"""Describe the towers of a model: which blocks, heads and channels can be removed, and where their sizes are written.

An `Anatomy` describes a tower by its configuration alone, without torch. A `Tower` is that of a loaded model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from .kinds import LoadedModel

Batch = Any  # calibration data that a tower runs at once: for a decoder alone, token ids [B, T] without padding
BlockOutput = Any  # what a block returns: the hidden state [B, T, width], or a tuple that begins with it


class Coupling(NamedTuple):
    """A tensor that holds a slice of every structure: structure j is entries j*width ... (j+1)*width-1 along `dim`.

    A tensor with `scored` False is cut with the structures, but does not count in their importance.
    """

    owner: nn.Module
    name: str
    dim: int
    width: int
    scored: bool = True

    @property
    def tensor(self) -> nn.Parameter:
        """The tensor."""
        return getattr(self.owner, self.name)


@dataclass(frozen=True)
class Part(ABC):
    """Structures of one sort in a block that can be removed: the channels of its MLP, or the heads of its attention.

    Attributes:
        module: the block's attribute that holds them.
        linears: the names of its linear layers. The last one reads what the others produce.
        counted_in: the module's attribute that stores the number of structures, if there is one.
        alike: whether the same structures must go in every block.
        noun: how messages name the structures.
    """

    module: str
    linears: tuple[str, ...]
    counted_in: str | None = None
    alike: bool = False
    noun: str = "channels"

    def module_of(self, block: nn.Module) -> nn.Module:
        """Return the module that holds the structures of a block."""
        return getattr(block, self.module)

    def linears_of(self, block: nn.Module) -> list[nn.Linear]:
        """Return a block's linear layers in the order of `linears`."""
        return [getattr(self.module_of(block), name) for name in self.linears]

    def couplings(self, block: nn.Module) -> Iterator[Coupling]:
        """Yield each tensor of a block that holds slices of the structures.

        Structures are rows of all the linear layers but the last, and columns of the last.
        """
        *by_rows, by_columns = self.linears_of(block)
        widths = self.row_widths(self.module_of(block))
        for linear, width in zip(by_rows, widths, strict=True):
            yield Coupling(linear, "weight", 0, width)
            if linear.bias is not None:
                yield Coupling(linear, "bias", 0, width)
        # The last layer has one column per row of the first one. Its bias belongs to its outputs, which stay.
        yield Coupling(by_columns, "weight", 1, widths[0])

    def resized(self, block: nn.Module, count: int) -> None:
        """Note in the modules of a block that it has `count` structures, after its tensors were cut."""
        for linear in self.linears_of(block):
            linear.out_features, linear.in_features = linear.weight.shape
        if self.counted_in:
            setattr(self.module_of(block), self.counted_in, count)

    @abstractmethod
    def row_widths(self, module: nn.Module) -> list[int]:
        """Return how many rows of each linear layer but the last belong to one structure."""

    @abstractmethod
    def count(self, config: PretrainedConfig) -> int:
        """Return the number of structures in each block, according to the configuration."""

    @abstractmethod
    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return key -> value of a configuration with `count` structures in each block."""

    @abstractmethod
    def sizes(self, block: nn.Module, count: int) -> dict[str, int]:
        """Return key -> value of a configuration for a block that has `count` structures."""


@dataclass(frozen=True)
class Anatomy:
    """A tower of blocks, described by the configuration of its model.

    Attributes:
        name: "text", "vision", "encoder" or "decoder".
        config: the configuration that holds the tower's sizes, which may be a part of the model's.
        blocks_key: its key for the number of blocks.
        parts: "mlp" and "attention" -> the structures in every block. A decoder may also have "cross-attention", which
            loses as many heads as "attention" does.
        fixed: how many blocks at the beginning can never be removed.
        own_sizes: whether the configuration has sizes for this tower alone. If not, a tower that is narrowed by itself
            has other widths than the configuration says.
    """

    name: str
    config: PretrainedConfig
    blocks_key: str
    parts: Mapping[str, Part]
    fixed: int = 0
    own_sizes: bool = True

    @property
    def blocks(self) -> int:
        """The number of blocks, according to the configuration."""
        return getattr(self.config, self.blocks_key)


class Tower(ABC):
    """A tower of blocks in a loaded model.

    Attributes:
        model: the whole model.
        config: the configuration that holds the tower's sizes.
        anatomy: its description.
    """

    def __init__(self, model: LoadedModel, anatomy: Anatomy) -> None:
        """Take a loaded model and the description of one of its towers."""
        self.model, self.anatomy, self.config = model, anatomy, anatomy.config

    @property
    def parts(self) -> Mapping[str, Part]:
        """The structures in every block, by name."""
        return self.anatomy.parts

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The blocks in their order."""

    @abstractmethod
    def keep_blocks(self, kept: Sequence[int]) -> None:
        """Remove all blocks but those with the indices `kept`, in the model and in per-layer lists of `config`."""

    @abstractmethod
    def run(self, batch: Batch) -> None:
        """Run all blocks on a batch of calibration data."""

    @abstractmethod
    def summed_loss(self, state: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the summed loss of a calibration batch, from the output of the last block."""

    @abstractmethod
    def targets(self, batch: Batch) -> int:
        """Return the number of targets in a calibration batch."""

    def rows(self, batch: Batch) -> list[Batch]:
        """Return the rows of a calibration batch, each as a batch; the batch itself if they have no loss apart."""
        return [row[None] for row in batch]

    def sequences(self, batch: Batch) -> int:
        """Return the number of rows of a calibration batch."""
        return len(self.rows(batch))

    def tokens(self, batch: Batch) -> int:
        """Return the number of tokens that the blocks are run on for a calibration batch."""
        return batch.numel()

    def problem(self, batch: Batch) -> str:
        """Return what is wrong with a calibration batch, as a sentence; "" if nothing is."""
        import torch

        if batch.dim() == 2 and batch.dtype == torch.long and batch.shape[0] >= 1 and batch.shape[1] >= 2:
            return ""
        return (
            f"has dtype {batch.dtype} and shape {list(batch.shape)}. Pass int64 token ids of shape [sequences, tokens] "
            "with at least 2 tokens"
        )

    def skipped(self, index: int, state: torch.Tensor, options: Mapping[str, Any]) -> BlockOutput:
        """Return what the body takes for the output of block `index` if the block passes its input on."""
        return state
