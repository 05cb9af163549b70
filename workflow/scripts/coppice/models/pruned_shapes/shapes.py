"""Checkpoints whose layers have different widths: which shapes they have, and the model that fits them.

Structured pruning by LLM-Pruner, Torch-Pruning, FLAP and the like leaves every layer with heads, KV heads and an MLP
width of its own; a block may have lost its attention or its MLP altogether. The configuration keeps the uniform
numbers; `pruned_shapes.json` beside it holds what differs, by layer, in the format of transformers' `per_layer_config`
(which the models of transformers 5.23 cannot be built from yet). Where that file is absent, the shapes are read off the
weights. Known are Llama, Qwen2, Qwen3 and Mistral.
"""

import json
from pathlib import Path

from coppice.core import fingerprints
from coppice.core.errors import CheckpointError
from coppice.core.json_text import parsed
from coppice.core.records import atomic

MANIFEST = "pruned_shapes.json"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
LAYER = "model.layers."


def tensor_shapes(folder):
    """name -> shape of every tensor of a safetensors checkpoint, from the files' headers; None for other formats."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for path in fingerprints.weights_files(folder):
        if path.suffix != ".safetensors":
            return None
        try:
            # the library calls a file that may not be read one that is not there; numpy is the quickest to import
            with open(path, "rb"), safe_open(path, "np") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as safetensors ({error}); copy or fetch the file again"
            ) from error
    return shapes


def layers_of(folder, config):
    """What each layer of a checkpoint holds: layer index -> {num_attention_heads, num_key_value_heads,
    intermediate_size}, for those that differ from `config`; {} where none does, or another architecture.

    A missing attention or MLP has width 0. Raises CheckpointError for widths that no model can have, for a checkpoint
    all of whose layers differ from the configuration alike, and for a manifest that is not the weights'.
    """
    # quantised weights are packed: their shapes say nothing of the layers' widths
    known = config.model_type in FAMILIES and not getattr(config, "quantization_config", None)
    shapes = tensor_shapes(folder) if known else None
    if shapes is None:
        return {}
    found = {index: _widths(folder, index, shapes, config) for index in range(config.num_hidden_layers)}
    uniform = {key: getattr(config, key) for key in KEYS}
    odd = {index: widths for index, widths in found.items() if widths != uniform}
    manifest = _read_manifest(folder)
    if manifest is not None:
        _check_manifest(folder, manifest, odd)
    elif len(odd) == len(found) and len({tuple(widths.values()) for widths in found.values()}) == 1:
        raise CheckpointError(
            f"{folder}: every layer has {_said(odd[0])}, but config.json says {_said(uniform)}: "
            "its config.json and its weights do not belong together"
        )
    for index, widths in odd.items():
        _check_widths(folder, index, widths, uniform)
    return odd


def _widths(folder, index, shapes, config):
    prefix, head = f"{LAYER}{index}.", head_dim(config)
    names = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    if not names:
        layers = sorted({int(n.split(".")[2]) for n in shapes if n.startswith(LAYER)})
        raise CheckpointError(
            f"{folder}: has no tensor of layer {index}, its config.json says {config.num_hidden_layers} layers "
            f"(there are {len(layers)}: number them from 0 and set num_hidden_layers)"
        )
    rows = {part: shapes.get(f"{prefix}{part}.weight", (0,))[0] for part in ("self_attn.q_proj", "self_attn.k_proj")}
    for part, width in rows.items():
        if width % head:
            raise CheckpointError(f"{folder}: layer {index}'s {part} has {width} rows, no multiple of head_dim {head}")
    query, key = (width // head for width in rows.values())
    return dict(zip(KEYS, (query, key, shapes.get(f"{prefix}mlp.gate_proj.weight", (0,))[0]), strict=True))


def head_dim(config):
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_widths(folder, index, widths, uniform):
    query, key, _ = widths.values()
    if bool(query) != bool(key) or (key and query % key):
        raise CheckpointError(
            f"{folder}: layer {index} has {query} query heads and {key} KV heads: a whole number of query heads "
            "has to share each KV head"
        )
    larger = [name for name in KEYS if widths[name] > uniform[name]]
    if larger:
        raise CheckpointError(
            f"{folder}: layer {index} has {_said(widths)}, more than config.json's {_said(uniform)}: "
            "its config.json and its weights do not belong together"
        )


def _read_manifest(folder):
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        content = parsed(path.read_text(encoding="utf-8"))["per_layer_config"]
        return {int(index): {key: int(widths[key]) for key in KEYS} for index, widths in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is no manifest of layer shapes ({error!r}); delete it, and the shapes are read off the weights"
        ) from error


def _check_manifest(folder, manifest, odd):
    wrong = [index for index in sorted(set(manifest) | set(odd)) if manifest.get(index) != odd.get(index)]
    if wrong:
        index = wrong[0]
        more = f" (and {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{Path(folder) / MANIFEST}: layer {index} is said to have {_said(manifest.get(index))}, the weights have "
            f"{_said(odd.get(index))}{more}; delete the file, and the shapes are read off the weights"
        )


def _said(widths):
    if not widths:
        return "config.json's widths"
    query, key, channels = (widths[name] for name in KEYS)
    return f"{query} heads, {key} KV heads, {channels} MLP channels"


def write_manifest(folder, config):
    """Write `pruned_shapes.json` for the checkpoint in `folder` where its layers differ from `config`."""
    odd = layers_of(folder, config)
    if odd:
        with atomic(Path(folder) / MANIFEST) as file:
            json.dump({"per_layer_config": {str(index): widths for index, widths in odd.items()}}, file, indent=1)
    return odd
