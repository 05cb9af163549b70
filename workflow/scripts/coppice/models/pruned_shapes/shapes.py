"""Find out which layers of a checkpoint have other widths than its configuration says.

Structured pruning with LLM-Pruner, Torch-Pruning, FLAP and similar tools leaves each layer with its own number of
heads, KV heads and MLP channels; a block may have lost its attention or its MLP altogether. `config.json` keeps the
uniform numbers, and `pruned_shapes.json` beside it lists the layers that differ, in the format of transformers'
`per_layer_config`, from which transformers 5.23 cannot build these models yet. Without that file, the widths come from
the shapes of the weights. Llama, Qwen2, Qwen3 and Mistral are supported, and the text towers of Qwen2-VL, Qwen2.5-VL
and Qwen3-VL. `stacks` supports T5, mT5, BART, mBART, CLIP and SigLIP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from coppice.core import fingerprints
from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError
from coppice.core.json_text import parsed
from coppice.core.records import atomic

from . import stacks
from .stacks import MANIFEST

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
LAYERS = ("model.layers.", "model.language_model.layers.")  # how the names of a text layer's tensors begin in files

Shapes = dict[str, tuple[int, ...]]  # name of a tensor -> its shape
Widths = dict[str, int]  # key of KEYS -> its value for one layer


def tensor_shapes(folder: PathLike) -> Shapes | None:
    """Return name -> shape of all tensors of a safetensors checkpoint, from file headers; None for other formats."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for path in fingerprints.weights_files(folder):
        if path.suffix != ".safetensors":
            return None
        try:
            # `open`, because safetensors reports a file without read permission as missing; numpy imports fastest
            with open(path, "rb"), safe_open(path, "np") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as safetensors ({error}). Copy or fetch the file again."
            ) from error
    return shapes


def layers_of(
    folder: PathLike, config: PretrainedConfig | SimpleNamespace, just_saved: bool = False
) -> dict[int, Widths] | dict[str, Widths]:
    """Return the widths of those layers of a checkpoint that differ from `config`.

    Args:
        folder: the checkpoint.
        config: its configuration.
        just_saved: whether the weights were written with this configuration, so that they belong together even if all
            layers differ from it in the same way.

    Returns:
        layer index -> {num_attention_heads, num_key_value_heads, intermediate_size}; a removed attention or MLP has
        width 0. {} if no layer differs, and for other architectures. For an encoder-decoder, see `stacks.layers_of`.

    Raises:
        CheckpointError: if no model can have these widths, if all layers differ from the configuration in the same way,
            or if the manifest does not match the weights.
    """
    # quantized weights are packed, so their shapes do not show the widths of the layers
    supported = config.model_type in (*FAMILIES, *stacks.STACKS) and not getattr(config, "quantization_config", None)
    shapes = tensor_shapes(folder) if supported else None
    if shapes is None:
        return {}
    if config.model_type in stacks.STACKS:
        return stacks.layers_of(folder, config, shapes, just_saved)
    config = text_config(config)
    found = {index: _widths(folder, index, shapes, config) for index in range(config.num_hidden_layers)}
    uniform = {key: getattr(config, key) for key in KEYS}
    odd = {index: widths for index, widths in found.items() if widths != uniform}
    manifest = _read_manifest(folder)
    if manifest is not None:
        _check_manifest(folder, manifest, odd)
    elif not just_saved and len(odd) == len(found) and len({tuple(widths.values()) for widths in found.values()}) == 1:
        raise CheckpointError(
            f"{folder}: every layer has {_described(odd[0])}, but config.json says {_described(uniform)}. "
            "Use the config.json that belongs to these weights."
        )
    for index, widths in odd.items():
        _check_widths(folder, index, widths, uniform)
    return odd


def text_config(config: PretrainedConfig | SimpleNamespace) -> PretrainedConfig | SimpleNamespace:
    """Return the part of a configuration that describes the model's text tower."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def layer_prefix(names: Iterable[str]) -> str:
    """Return how the names of the tensors of text layers begin, before the layer's index."""
    names = list(names)
    return next((prefix for prefix in LAYERS if any(name.startswith(prefix) for name in names)), LAYERS[0])


def _widths(folder: PathLike, index: int, shapes: Shapes, config: PretrainedConfig | SimpleNamespace) -> Widths:
    every, head = layer_prefix(shapes), head_dim(config)
    prefix = f"{every}{index}."
    names = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    if not names:
        layers = {name.removeprefix(every).split(".")[0] for name in shapes if name.startswith(every)}
        raise CheckpointError(
            f"{folder}: config.json says {config.num_hidden_layers} layers, but layer {index} has no tensor "
            f"(there are {len(layers)} layers). Number them from 0 and set num_hidden_layers."
        )
    rows = {part: shapes.get(f"{prefix}{part}.weight", (0,))[0] for part in ("self_attn.q_proj", "self_attn.k_proj")}
    for part, width in rows.items():
        if width % head:
            raise CheckpointError(
                f"{folder}: layer {index}'s {part} has {width} rows, which is not a multiple of head_dim {head}. "
                "Prune whole heads."
            )
    query, key = (width // head for width in rows.values())
    return dict(zip(KEYS, (query, key, shapes.get(f"{prefix}mlp.gate_proj.weight", (0,))[0]), strict=True))


def head_dim(config: PretrainedConfig | SimpleNamespace) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_widths(folder: PathLike, index: int, widths: Widths, uniform: Widths) -> None:
    query, key, _ = widths.values()
    if bool(query) != bool(key) or (key and query % key):
        raise CheckpointError(
            f"{folder}: layer {index} has {query} query heads and {key} KV heads. The number of query heads must be a "
            "multiple of the number of KV heads."
        )
    larger = [name for name in KEYS if widths[name] > uniform[name]]
    if larger:
        raise CheckpointError(
            f"{folder}: layer {index} has {_described(widths)}, more than config.json's {_described(uniform)}. "
            "Use the config.json that belongs to these weights."
        )


def _read_manifest(folder: PathLike) -> dict[int, Widths] | None:
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        content = parsed(path.read_text(encoding="utf-8"))["per_layer_config"]
        return {int(index): {key: int(widths[key]) for key in KEYS} for index, widths in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is not a manifest of layer shapes ({error!r}). Delete it to have the weights' shapes used."
        ) from error


def _check_manifest(folder: PathLike, manifest: Mapping[int, Widths], odd: Mapping[int, Widths]) -> None:
    wrong = [index for index in sorted(set(manifest) | set(odd)) if manifest.get(index) != odd.get(index)]
    if wrong:
        index = wrong[0]
        more = f" (and {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{Path(folder) / MANIFEST}: layer {index} has {_described(manifest.get(index))} in this file but "
            f"{_described(odd.get(index))} in the weights{more}. Delete the file to have the weights' shapes used."
        )


def _described(widths: Widths | None) -> str:
    if not widths:
        return "config.json's widths"
    query, key, channels = (widths[name] for name in KEYS)
    return f"{query} heads, {key} KV heads, {channels} MLP channels"


def write_manifest(folder: PathLike, config: PretrainedConfig) -> dict[int, Widths] | dict[str, Widths]:
    """Write `pruned_shapes.json` into `folder` if its layers differ from `config`, and return what differs."""
    odd = layers_of(folder, config, just_saved=True)
    if odd:
        with atomic(Path(folder) / MANIFEST) as file:
            json.dump({"per_layer_config": {str(index): widths for index, widths in odd.items()}}, file, indent=1)
    return odd
