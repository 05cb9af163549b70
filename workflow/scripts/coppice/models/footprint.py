"""Count the parameters of a model, its multiply-accumulates per token and the bytes of its weights.

What a token costs is counted by running a few tokens and noting the layers that compute. So experts that a token does
not visit, layers that run twice and parts that no text reaches are counted as they run. If a layer is of a kind that is
not understood here, the number is unknown (None), because a sum without that layer would be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from coppice import models
from coppice.core.aliases import Record

from . import kinds
from .estimates import EXPERTS
from .output_head import causal_lm
from .prefix_tree import architectures
from .pruned_shapes.building import NoAttention

if TYPE_CHECKING:
    from .kinds import LoadedModel

DEFAULT_CONTEXT = 2048
LINEAR = (nn.Linear, Conv1D)


def measure(model: LoadedModel, context_length: int | None = None) -> Record:
    """Return {parameters, active_parameters, linear_macs, attention_macs, context_length} of a model.

    Args:
        model: a model with its weights; it runs the first of its kind's probes.
        context_length: the number of keys that a token attends to, by default 2048 or the model's own length if that is
            shorter.

    Returns:
        parameters counts a tied tensor once, and active_parameters leaves out experts that one token does not visit.
        linear_macs is the number of weights that one token uses in all linear layers, routers and experts,
        `lm_head` included even if it is tied, because its product is computed. attention_macs: see
        `attention_macs`. A number is None if it is unknown. For an encoder-decoder, a token is one of the source and
        one of the target.
    """
    known = models.known_context_length(model) or DEFAULT_CONTEXT
    context = context_length or min(DEFAULT_CONTEXT, known)
    ran, parameters = _observed(model), models.parameters(model)
    idle = _idle_parameters(model, ran)
    return {
        "parameters": parameters,
        "active_parameters": None if idle is None else parameters - idle,
        "linear_macs": _linear_macs(model, ran),
        "attention_macs": attention_macs(model, context),
        "context_length": context,
    }


@dataclass
class _Ran:
    """What ran for a few tokens.

    Attributes:
        tokens: their number.
        modules: the modules that were called.
        rows: linear layer or module of experts -> number of rows that it multiplied. Experts that choose among their
            rows themselves have no number.
    """

    tokens: int
    modules: set[nn.Module] = field(default_factory=set)
    rows: dict[nn.Module, int] = field(default_factory=dict)


def _observed(model: nn.Module) -> _Ran:
    """Run the first probe of the model's kind and return what ran."""
    kind = kinds.of(model.config)
    probe = kind.probes(model)[0]
    ran = _Ran(probe["input_ids"].numel())

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], _: object) -> None:
        ran.modules.add(module)
        tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
        rows = None
        if isinstance(module, LINEAR):
            rows = tensors[0].numel() // tensors[0].shape[-1]
        elif _stacks(module):  # they get the states and, for each, the experts to visit
            rows = next((t.numel() for t in tensors if t.dim() == 2 and not t.is_floating_point()), None)
        if rows is not None:
            ran.rows[module] = ran.rows.get(module, 0) + rows

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            kind.outputs(model, probe)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return ran


def _idle_parameters(model: nn.Module, ran: _Ran) -> int | None:
    """Return the number of parameters of the experts that one token does not visit; None if unknown."""
    config = causal_lm(model).config.get_text_config()
    experts = [module for module in model.modules() if _stacks(module)]
    if not experts:
        return None if any((getattr(config, name, None) or 0) > 1 for name in EXPERTS) else 0
    idle = 0
    for module in experts:
        if module not in ran.rows:
            return None
        count = len(_stacks(module)[0])
        size = sum(parameter.numel() for parameter in module.parameters())
        idle += size * (ran.tokens * count - ran.rows[module]) // (ran.tokens * count)
    return idle


def _linear_macs(model: nn.Module, ran: _Ran) -> int | None:
    """Return the multiply-accumulates of one token in all layers but the attention's own; None if unknown."""
    if causal_lm(model).get_output_embeddings() not in ran.rows:
        return None  # no layer computes the logits
    total = 0
    for module in ran.modules:
        macs = _macs_of(module, ran)
        if macs is None:
            return None
        total += macs
    return total // ran.tokens


def _macs_of(module: nn.Module, ran: _Ran) -> int | None:
    """Return what these tokens multiply in a module itself, without its parts; None if unknown."""
    if isinstance(module, LINEAR):
        return ran.rows[module] * _weights(module)
    if isinstance(module, nn.Embedding):
        return 0  # it is looked up
    stacks, kind = _stacks(module), type(module).__name__
    without_weights = "Expert" in kind and not any(isinstance(part, LINEAR) for part in module.modules())
    if _is_packed(module) or (module not in ran.rows if stacks else without_weights):
        return None
    # the fused kernel of a state space uses the weights of its layers without calling them
    if any(isinstance(part, (*LINEAR, nn.Conv1d)) and part not in ran.rows for part in module.children()):
        return None
    total = sum(ran.rows[module] * stack[0].numel() for stack in stacks)
    for name, matrix in module.named_parameters(recurse=False):
        counted = any(matrix is stack for stack in stacks) or name.endswith("bias")
        if counted or sum(size > 1 for size in matrix.shape) < 2:  # a vector scales or shifts
            continue
        if "Router" not in kind or matrix.dim() != 2:
            return None
        total += ran.tokens * matrix.numel()
    return total


def _weights(module: nn.Linear | Conv1D) -> int:
    """Return the number of weights of a linear layer (GPT-2's are `Conv1D`)."""
    # quantized weights are packed: the size of their tensor is not the number of weights
    return module.weight.numel() if module.weight.is_floating_point() else module.in_features * module.out_features


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module itself holds quantized weights: the shape of their tensor is not that of the matrix."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    packed = (torch.uint8, torch.int8, torch.int32)
    return any(tensor.dim() > 1 and tensor.dtype in packed for tensor in own)


def _stacks(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a module's experts, each of all experts together [experts, ., .]."""
    named = "Expert" in type(module).__name__
    return [p for p in module.parameters(recurse=False) if named and p.dim() == 3 and p.is_floating_point()]


def attention_macs(model: LoadedModel, context: int) -> int | None:
    """Return the multiply-accumulates for the attention scores and values of one token; None for another architecture.

    They are keys * num_attention_heads * (width of a key + width of a value), summed over layers, where keys is
    `context` or the layer's sliding window if that is shorter. Only architectures are known whose attention tests have
    compared with what runs.
    """
    causal = causal_lm(model)
    if causal.config.get_text_config().model_type not in architectures.EXACT:
        return None
    total = 0
    for block in getattr(causal.base_model, "layers", [None]):
        attention = getattr(block, "self_attn", None)
        if isinstance(attention, NoAttention):
            continue
        if not hasattr(attention, "o_proj"):
            return None
        # Qwen's layers have a window of their own (None: full attention); Mistral's use that of the configuration
        window = getattr(attention, "sliding_window", getattr(model.config, "sliding_window", None))
        total += min(context, window or context) * _widths(attention)
    return total


def _widths(attention: nn.Module) -> int:
    """Return the width of all heads' keys plus that of their values, which differ in DeepSeek's latent attention."""
    values = _weights(attention.o_proj) // attention.o_proj.out_features
    if not hasattr(attention, "v_head_dim"):
        return 2 * values
    return values + values // attention.v_head_dim * attention.qk_head_dim


def nonzero_parameters(model: LoadedModel) -> int | None:
    """Return the number of nonzero parameters, tied ones once; None if quantized: a zero is then stored as a code."""
    parameters = list(model.parameters())
    if getattr(model, "is_quantized", False):
        return None
    return sum(int(parameter.count_nonzero()) for parameter in parameters)


def weight_bytes(model: LoadedModel) -> int:
    """Return the bytes of all parameters in memory; a tied one counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
