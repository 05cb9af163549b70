"""The two encoders of CLIP and SigLIP as towers: what can be pruned in them, and where their sizes are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .towers import Part

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Channels(Part):
    """The channels of an MLP: one row of `fc1` with its bias, and one column of `fc2`."""

    def row_widths(self, module: nn.Module) -> list[int]:
        """Return 1 row."""
        return [1]

    def count(self, config: PretrainedConfig) -> int:
        """Return the width of the MLP."""
        return config.intermediate_size

    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return the width of the MLP."""
        return {"intermediate_size": count}

    def sizes(self, block: nn.Module, count: int) -> dict[str, int]:
        """Return the width of the MLP."""
        return {"intermediate_size": count}


@dataclass(frozen=True)
class Heads(Part):
    """The heads of an attention: rows of `q_proj`, `k_proj`, `v_proj` and their biases, and columns of `out_proj`."""

    def row_widths(self, module: nn.Module) -> list[int]:
        """Return the width of a head."""
        return [module.head_dim] * 3

    def count(self, config: PretrainedConfig) -> int:
        """Return the number of heads."""
        return config.num_attention_heads

    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return the number of heads."""
        return {"num_attention_heads": count}

    def sizes(self, block: nn.Module, count: int) -> dict[str, int]:
        """Return the number of heads."""
        return {"num_attention_heads": count}


MLP = Channels("mlp", ("fc1", "fc2"))
ATTENTION = Heads("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj"), counted_in="num_heads")
