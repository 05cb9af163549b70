"""What the models need of torch, transformers, accelerate and bitsandbytes beyond their documented interfaces.

Each function has a test in `tests/unit/test_library_compat.py`, which fails if a library changes what it uses.
Seen to work with the versions that envs/requirements.txt pins: torch 2.13, transformers 5.23, accelerate 1.15 and
bitsandbytes 0.50.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def whole_modules(model: PreTrainedModel) -> list[str]:
    """Return the class names of the blocks of a model that must stay on one device; [] if the model names none."""
    return list(model._no_split_modules or ())


def attention(config: PretrainedConfig) -> str:
    """Return the name of the attention implementation that a model with this configuration runs."""
    return config._attn_implementation


def is_hooked(module: nn.Module) -> bool:
    """Return whether hooks run around a module. They may change its result, or move its weight (accelerate's do)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def text_config(model: nn.Module) -> PretrainedConfig:
    """Return the configuration of a model's text part, also of a model with an adapter."""
    return model.config.get_text_config()


def forget_lengths(model: nn.Module) -> None:
    """Make a model's dynamic NTK RoPE forget the longest text that it has seen, which sets its frequencies.

    transformers raises the frequencies' scale for a text that is longer than all before it, and then keeps it for all
    texts beyond the original context: the numbers of a text would depend on those before it.
    """
    for module in model.modules():
        if not hasattr(module, "max_seq_len_cached") or "dynamic" not in str(getattr(module, "rope_type", "")):
            continue
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            prefix, found, _ = name.partition("original_inv_freq")
            if found:
                module.register_buffer(f"{prefix}inv_freq", getattr(module, name).clone(), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def keep_4_bit_layers_unpacked(model: nn.Module) -> None:
    """Make bitsandbytes compute with 4-bit layers in the same way on every CPU.

    On a CPU with AVX512-BF16 it packs a layer's weights permanently at the first forward pass without gradients. Packed
    layers round to bfloat16, need widths that are multiples of 64 and 32, and pass no gradient on. A training that
    continues after a validation would then learn something else, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
