"""Read the sizes of a language model from its configuration, whatever names its architecture gives to them.

A size is None if the configuration does not state it: Mamba has no heads, and Mamba and BLOOM have no context length.
Neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

# The names of each size, the most usual one first. A configuration object of transformers also answers to the usual
# name of an architecture that has its own; the content of a config.json does not.
CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "context_length",
    "seq_length",
)
HIDDEN = ("hidden_size", "n_embd", "d_model")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a language model; None if its configuration does not state one.

    Attributes:
        context_length: the most tokens that the model was made for.
        hidden: the width of the states between two layers.
        inner: the width of the MLP.
        layers: the number of layers.
        heads: the number of attention heads.
    """

    context_length: int | None
    hidden: int | None
    inner: int | None
    layers: int | None
    heads: int | None


def of(config: object) -> Dimensions:
    """Return the sizes in a configuration of transformers, or in the content of a config.json.

    Of a model that reads more than text, they are those of the part that reads text.
    """
    if isinstance(config, dict):
        nested = config.get("text_config")
        text = SimpleNamespace(**(nested if isinstance(nested, dict) else config))
    elif hasattr(config, "get_text_config"):
        text = config.get_text_config()
    else:
        text = config
    return Dimensions(*(_first(text, names) for names in (CONTEXT, HIDDEN, INNER, LAYERS, HEADS)))


def vision_parameters(config: Mapping[str, Any]) -> int:
    """Return about how many parameters the layers of a vision tower have; 0 without one.

    config: the content of a config.json.
    """
    vision = config.get("vision_config") or {}
    found = of(vision)
    layers, hidden = vision.get("depth") or found.layers or 0, found.hidden or 0
    return layers * (4 * hidden**2 + 2 * hidden * (found.inner or 4 * hidden))


def _first(config: object, names: tuple[str, ...]) -> int | None:
    """Return the first of these values that is a size. A few architectures use -1, or one number a layer."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)
