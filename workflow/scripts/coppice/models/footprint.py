"""Sizes of a causal language model: parameters, multiply-accumulates a token, bytes of weights."""

from torch import nn

from coppice import models

from .output_head import causal_lm
from .pruned_shapes.building import NoAttention

DEFAULT_CONTEXT = 2048


def measure(model, context_length=None):
    """Parameters (a tied tensor once) and multiply-accumulates a token: {parameters, linear_macs, attention_macs,
    context_length}.

    linear_macs: weights of every linear layer, `lm_head` included also when tied (its product is computed).
    attention_macs: see `attention_macs`; context_length: the keys that a token attends to, by default 2048 or the
    model's own length, if shorter.
    """
    context = context_length or min(DEFAULT_CONTEXT, models.context_length(model))
    return {
        "parameters": models.parameters(model),
        "linear_macs": sum(_weights(module) for module in model.modules() if isinstance(module, nn.Linear)),
        "attention_macs": attention_macs(model, context),
        "context_length": context,
    }


def _weights(linear):
    # quantised weights are packed: their tensor does not tell how many there are
    return linear.weight.numel() if linear.weight.is_floating_point() else linear.in_features * linear.out_features


def attention_macs(model, context):
    """Scores and values of a token that attends to `context` keys, or to the layer's sliding window where that is
    shorter: 2 * keys * num_attention_heads * head_dim, summed over layers. None where the blocks are not Llama's kind.
    """
    total = 0
    for block in getattr(causal_lm(model).base_model, "layers", [None]):
        attention = getattr(block, "self_attn", None)
        if isinstance(attention, NoAttention):
            continue
        if not hasattr(attention, "o_proj"):
            return None
        # Qwen's layers carry their own window (None: full attention), Mistral's take the configuration's.
        window = getattr(attention, "sliding_window", getattr(model.config, "sliding_window", None))
        total += 2 * min(context, window or context) * attention.o_proj.weight.shape[1]
    return total


def nonzero_parameters(model):
    """Number of parameters that are not zero, tied ones once; None for a quantised model, whose zeros are codes."""
    parameters = list(model.parameters())
    if getattr(model, "is_quantized", False):
        return None
    return sum(int(parameter.count_nonzero()) for parameter in parameters)


def weight_bytes(model):
    """Bytes of all parameters as they lie in memory, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
