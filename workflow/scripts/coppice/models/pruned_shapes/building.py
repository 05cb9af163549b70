"""Build the model that fits a checkpoint whose layers differ in width, and fill it with the checkpoint's weights."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

from coppice.core import fingerprints
from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError

from .. import kinds
from .shapes import KEYS, Widths, head_dim, layer_prefix, text_config

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig, PreTrainedModel

# how the name of a tensor begins in the files of Qwen2-VL and Qwen2.5-VL -> in the model
LONGER = {"visual.": "model.visual.", "model.": "model.language_model."}


def load(folder: PathLike, config: PretrainedConfig, odd: Mapping[int, Widths], dtype: torch.dtype) -> PreTrainedModel:
    """Load the model of a checkpoint whose text layers differ in width, on the CPU.

    Every tensor in the files must have a place in the model, and every place a tensor.

    Args:
        folder: the checkpoint.
        config: its configuration, which holds the uniform widths.
        odd: layer index -> widths, as from `layers_of`.
        dtype: of all floating-point weights.

    Raises:
        CheckpointError: if the configuration and the weights do not match.
    """
    # weights on the meta device take no memory; the tensors of the files replace them below
    with torch.device("meta"):
        model = kinds.of(config).auto_class().from_config(config, dtype=dtype)
    state = {}
    for path in fingerprints.weights_files(folder):
        state |= load_file(path)
    shape(model, odd, state)
    state = _in_model(state, model)
    if config.tie_word_embeddings:
        embedding = model.get_input_embeddings().weight
        tied = next(name for name, weight in model.named_parameters() if weight is embedding)
        _check_tied(folder, state, tied)
        state["lm_head.weight"] = state[tied]
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        # `assign`, because nothing can be copied into a meta tensor; `strict` reports what is missing or left over
        model.load_state_dict(state, assign=True, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its config.json and its weights do not match: {error}") from error
    if config.tie_word_embeddings:
        model.tie_weights()  # `assign` has given both their own parameter
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if any(buffer.is_meta for buffer in part.buffers(recurse=False)):
                # rotary embeddings: no file has their buffers, so they are still on meta
                setattr(module, name, type(part)(config=part.config))
    model.config.name_or_path = str(folder)
    return model


def shape(model: PreTrainedModel, odd: Mapping[int, Widths], names: Container[str]) -> None:
    """Give every layer in `odd` its own widths, and remove norms of removed blocks that are not in `names`."""
    prefix = layer_prefix(names)
    for index, widths in odd.items():
        reshape(model, index, widths)
        _without_lone_norms(model.get_decoder().layers[index], f"{prefix}{index}.", names)


def _in_model(state: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return tensors of files by the names that they have in the model, which for image-text models may be longer."""
    known = set(model.state_dict())
    found = {}
    for name, tensor in state.items():
        longer = (name.replace(short, long, 1) for short, long in LONGER.items() if name.startswith(short))
        found[name if name in known else next((one for one in longer if one in known), name)] = tensor
    return found


def _check_tied(folder: PathLike, state: Mapping[str, torch.Tensor], tied: str) -> None:
    head, embedding = state.get("lm_head.weight"), state[tied]
    if head is not None and not head.equal(embedding):
        raise CheckpointError(
            f"{folder}: config.json ties lm_head.weight to embed_tokens.weight, but the two differ. "
            "Set tie_word_embeddings to false."
        )


def reshape(model: PreTrainedModel, index: int, widths: Widths) -> None:
    """Give layer `index` its own `widths`: linear layers of the new shape, on the device of the old, without values."""
    layer, head = model.get_decoder().layers[index], head_dim(text_config(model.config))
    query, key, channels = (widths[name] for name in KEYS)
    if query:
        attention = layer.self_attn
        rows = {"q_proj": query * head, "k_proj": key * head, "v_proj": key * head}
        for name, width in rows.items():
            _resize(attention, name, out_features=width)
        _resize(attention, "o_proj", in_features=query * head)
        # the forward pass gets the numbers of heads from the widths, and only this one from the module
        attention.num_key_value_groups = query // key
    else:
        layer.self_attn = NoAttention(head, index)
    if channels:
        for name in ("gate_proj", "up_proj"):
            _resize(layer.mlp, name, out_features=channels)
        _resize(layer.mlp, "down_proj", in_features=channels)
        layer.mlp.intermediate_size = channels
    else:
        layer.mlp = NoMlp()


def _without_lone_norms(layer: nn.Module, prefix: str, state: Container[str]) -> None:
    """Remove the norm of a removed block if the checkpoint has none: some tools drop it with the block it fed."""
    for norm, block in (("input_layernorm", layer.self_attn), ("post_attention_layernorm", layer.mlp)):
        if isinstance(block, NoAttention | NoMlp) and f"{prefix}{norm}.weight" not in state:
            setattr(layer, norm, nn.Identity())


def _resize(owner: nn.Module, name: str, **changes: int) -> None:
    old = getattr(owner, name)
    size = {"in_features": old.in_features, "out_features": old.out_features} | changes
    bias = old.bias is not None
    setattr(owner, name, nn.Linear(**size, bias=bias, device=old.weight.device, dtype=old.weight.dtype))


class NoAttention(nn.Module):
    """An attention block that was removed: it adds nothing, but the cache still counts its tokens."""

    def __init__(self, width: int, layer_idx: int) -> None:
        """Take the width of a head and the index of the layer."""
        super().__init__()
        self.width, self.layer_idx = width, layer_idx

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        """Return (zeros, None), in the form of an attention block's results."""
        # transformers reads the number of cached tokens from a layer's entry, so this layer needs one
        if past_key_values is not None:
            batch, length, _ = hidden_states.shape
            empty = hidden_states.new_zeros(batch, 1, length, self.width)
            past_key_values.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """An MLP that was removed: it adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden_states)
