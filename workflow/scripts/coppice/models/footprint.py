"""Count the parameters of a causal language model, its multiply-accumulates per token and the bytes of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from coppice import models
from coppice.core.aliases import Record

from .estimates import EXPERTS
from .output_head import causal_lm
from .pruned_shapes.building import NoAttention

if TYPE_CHECKING:
    from .kinds import LoadedModel

DEFAULT_CONTEXT = 2048


def measure(model: LoadedModel, context_length: int | None = None) -> Record:
    """Return {parameters, linear_macs, attention_macs, context_length} of a model.

    parameters counts a tied tensor once. linear_macs is the number of weights that one token uses in all linear layers
    and experts, `lm_head` included even if it is tied, because its product is computed. attention_macs: see
    `attention_macs`. context_length is the number of keys that a token attends to, by default 2048 or the model's own
    length if that is shorter.
    """
    known = models.known_context_length(model) or DEFAULT_CONTEXT
    context = context_length or min(DEFAULT_CONTEXT, known)
    return {
        "parameters": models.parameters(model),
        "linear_macs": sum(map(_weights, model.modules())) + _macs_of_experts(model),
        "attention_macs": attention_macs(model, context),
        "context_length": context,
    }


def _weights(module: nn.Module) -> int:
    """Return the number of weights of a linear layer (GPT-2's are `Conv1D`); 0 for other modules."""
    if not isinstance(module, nn.Linear | Conv1D):
        return 0
    # quantized weights are packed: the size of their tensor is not the number of weights
    return module.weight.numel() if module.weight.is_floating_point() else module.in_features * module.out_features


def _macs_of_experts(model: nn.Module) -> int:
    """Return the weights of experts that one token uses; the weights of all experts are one tensor [experts, ., .]."""
    config = causal_lm(model).config.get_text_config()
    every = next((count for name in EXPERTS if (count := getattr(config, name, None))), None)
    if not every:
        return 0
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 3 and p.shape[0] == every)
    return weights * config.num_experts_per_tok // every


def attention_macs(model: LoadedModel, context: int) -> int | None:
    """Return the multiply-accumulates for the attention scores and values of one token; None for another architecture.

    They are 2 * keys * num_attention_heads * head_dim, summed over layers, where keys is `context` or the layer's
    sliding window if that is shorter.
    """
    total = 0
    for block in getattr(causal_lm(model).base_model, "layers", [None]):
        attention = getattr(block, "self_attn", None)
        if isinstance(attention, NoAttention):
            continue
        if not hasattr(attention, "o_proj"):
            return None
        # Qwen's layers have a window of their own (None: full attention); Mistral's use that of the configuration
        window = getattr(attention, "sliding_window", getattr(model.config, "sliding_window", None))
        total += 2 * min(context, window or context) * attention.o_proj.weight.shape[1]
    return total


def nonzero_parameters(model: LoadedModel) -> int | None:
    """Return the number of nonzero parameters, tied ones once; None if quantized: a zero is then stored as a code."""
    parameters = list(model.parameters())
    if getattr(model, "is_quantized", False):
        return None
    return sum(int(parameter.count_nonzero()) for parameter in parameters)


def weight_bytes(model: LoadedModel) -> int:
    """Return the bytes of all parameters in memory; a tied one counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
