"""The model that fits a checkpoint whose layers have different widths, filled with its weights."""

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from coppice.core import fingerprints
from coppice.core.errors import CheckpointError

from .shapes import KEYS, LAYER, head_dim


def load(folder, config, odd, dtype):
    """The causal LM of an odd-shaped checkpoint, on the CPU: `odd` as from `layers_of`.

    Built from the configuration without memory, its layers given their own widths, then filled with the weights as
    they lie in the files; every tensor of the files has to find its place, and every place its tensor.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {}
    for path in fingerprints.weights_files(folder):
        state |= load_file(path)
    shape(model, odd, state)
    if config.tie_word_embeddings:
        _check_tied(folder, state)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state, assign=True, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: {error}; its config.json and its weights do not belong together") from error
    if config.tie_word_embeddings:
        model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)  # its buffers are in no file and still on meta
    model.config.name_or_path = str(folder)
    return model


def shape(model, odd, names):
    """Give every layer of `odd` its own widths, and take out norms that are not among `names` of tensors."""
    for index, widths in odd.items():
        reshape(model, index, widths)
        _without_lone_norms(model.model.layers[index], f"{LAYER}{index}.", names)


def _check_tied(folder, state):
    head, embedding = state.get("lm_head.weight"), state["model.embed_tokens.weight"]
    if head is not None and not head.equal(embedding):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false"
        )


def reshape(model, index, widths):
    """Give layer `index` its own `widths`: linear layers of the new shape, without values (on their device)."""
    layer, head = model.model.layers[index], head_dim(model.config)
    query, key, channels = (widths[name] for name in KEYS)
    if query:
        attention = layer.self_attn
        rows = {"q_proj": query * head, "k_proj": key * head, "v_proj": key * head}
        for name, width in rows.items():
            _resize(attention, name, out_features=width)
        _resize(attention, "o_proj", in_features=query * head)
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


def _without_lone_norms(layer, prefix, state):
    """Some tools drop the norm with the block that it fed."""
    for norm, block in (("input_layernorm", layer.self_attn), ("post_attention_layernorm", layer.mlp)):
        if isinstance(block, NoAttention | NoMlp) and f"{prefix}{norm}.weight" not in state:
            setattr(layer, norm, nn.Identity())


def _resize(owner, name, **changes):
    old = getattr(owner, name)
    size = {"in_features": old.in_features, "out_features": old.out_features} | changes
    bias = old.bias is not None
    setattr(owner, name, nn.Linear(**size, bias=bias, device=old.weight.device, dtype=old.weight.dtype))


class NoAttention(nn.Module):
    """An attention block that was removed: it adds nothing, and the cache still counts its tokens."""

    def __init__(self, width, layer_idx):
        super().__init__()
        self.width, self.layer_idx = width, layer_idx

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        """(zeros, None), as an attention block answers."""
        if past_key_values is not None:
            batch, length, _ = hidden_states.shape
            empty = hidden_states.new_zeros(batch, 1, length, self.width)
            past_key_values.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """An MLP that was removed: it adds nothing."""

    def forward(self, hidden_states):
        """Zeros."""
        return torch.zeros_like(hidden_states)
