"""Find out which blocks of a checkpoint with two towers have other widths than its configuration says.

T5's configuration has one width for the MLPs of both stacks and one number of heads, so a stack that was narrowed by
itself does not fit it; neither do blocks of different widths. The encoders of CLIP and SigLIP have configurations of
their own, which cannot say that heads were removed. `pruned_shapes.json` lists these blocks as "encoder.0", "vision.2"
and so on. This module does not import torch; `stack_building` builds the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError
from coppice.core.json_text import parsed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MANIFEST = "pruned_shapes.json"
Widths = dict[str, int]  # key -> its value for one block
Shapes = dict[str, tuple[int, ...]]
CROSS = "cross_num_heads"  # of a T5 decoder block; its configuration has one key for heads of all sorts
HEADS = "num_attention_heads"
SHARED = {CROSS: "num_heads"}  # key of a block -> key of the configuration


class _Stack(NamedTuple):
    """Where a stack keeps its widths.

    blocks: the configuration's key for the number of blocks.
    prefix: of the names of a block's tensors.
    tensors: key -> (name of a tensor in the block, the dimension that shows the width).
    section: the part of the configuration that is about the stack; "" if it is all of it.
    """

    blocks: str
    prefix: str
    tensors: Mapping[str, tuple[str, int]]
    section: str = ""


def _t5(name: str, blocks: str, mlp: int) -> _Stack:
    tensors = {"d_ff": (f"layer.{mlp}.DenseReluDense.wo", 1), "num_heads": ("layer.0.SelfAttention.q", 0)}
    if mlp == 2:
        tensors[CROSS] = ("layer.1.EncDecAttention.q", 0)
    return _Stack(blocks, f"{name}.block.", tensors)


def _bart(name: str) -> _Stack:
    return _Stack(f"{name}_layers", f"model.{name}.layers.", {f"{name}_ffn_dim": ("fc1", 0)})


def _dual(name: str) -> _Stack:
    tensors = {"intermediate_size": ("mlp.fc1", 0), HEADS: ("self_attn.q_proj", 0)}
    return _Stack("num_hidden_layers", f"{name}_model.encoder.layers.", tensors, f"{name}_config")


_T5 = {"encoder": _t5("encoder", "num_layers", 1), "decoder": _t5("decoder", "num_decoder_layers", 2)}
_BART = {name: _bart(name) for name in ("encoder", "decoder")}
_DUAL = {name: _dual(name) for name in ("text", "vision")}
STACKS = {
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bart", "mbart"), _BART),
    **dict.fromkeys(("clip", "metaclip_2", "siglip"), _DUAL),
}


def layers_of(
    folder: PathLike, config: PretrainedConfig | SimpleNamespace, shapes: Shapes, just_saved: bool
) -> dict[str, Widths]:
    """Return the widths of those blocks of a checkpoint that differ from `config`, as "encoder.0" -> widths.

    Args:
        folder: the checkpoint.
        config: its configuration.
        shapes: name -> shape of its tensors.
        just_saved: whether the weights were written with this configuration, so that they belong together even if all
            blocks differ from it in the same way.

    Raises:
        CheckpointError: A block has no such tensor or more than the configuration says, all blocks differ in the same
            way, or the manifest does not match the weights.
    """
    found, odd = {}, {}
    for name, stack in STACKS[config.model_type].items():
        section = getattr(config, stack.section) if stack.section else config
        blocks = getattr(section, stack.blocks, None) or section.num_layers
        for index in range(blocks):
            found[f"{name}.{index}"] = own = _widths(folder, f"{stack.prefix}{index}.", stack, shapes, section)
            uniform = {key: getattr(section, SHARED.get(key, key)) for key in own}
            if any(own[key] > uniform[key] for key in own):
                raise CheckpointError(
                    f"{folder}: block {index} of the {name} has {own}, more than config.json's {uniform}. Use the "
                    "config.json that belongs to these weights."
                )
            if own != uniform:
                odd[f"{name}.{index}"] = own
    manifest = Path(folder) / MANIFEST
    if manifest.is_file():
        _check_manifest(manifest, odd)
    elif not just_saved and len(odd) == len(found) and len({str({**one, CROSS: 0}) for one in found.values()}) == 1:
        raise CheckpointError(
            f"{folder}: every block has {next(iter(found.values()))}, but config.json says otherwise. Use the "
            "config.json that belongs to these weights."
        )
    return odd


def _widths(
    folder: PathLike, prefix: str, stack: _Stack, shapes: Shapes, config: PretrainedConfig | SimpleNamespace
) -> Widths:
    widths = {}
    for key, (tensor, dim) in stack.tensors.items():
        shape = shapes.get(f"{prefix}{tensor}.weight")
        if shape is None:
            raise CheckpointError(
                f"{folder}: config.json says that there is a block {prefix.rstrip('.')}, but it has no {tensor}.weight."
                " Use the config.json that belongs to these weights."
            )
        width = _head_dim(config) if key in ("num_heads", CROSS, HEADS) else 1
        if shape[dim] % width:
            raise CheckpointError(
                f"{folder}: {prefix}{tensor} has {shape[dim]} rows, which is not a multiple of the width {width} of a "
                "head. Prune whole heads."
            )
        widths[key] = shape[dim] // width
    return widths


def _head_dim(config: PretrainedConfig | SimpleNamespace) -> int:
    return config.d_kv if hasattr(config, "d_kv") else config.hidden_size // config.num_attention_heads


def _check_manifest(path: Path, odd: Mapping[str, Widths]) -> None:
    try:
        content = parsed(path.read_text(encoding="utf-8"))["per_layer_config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is not a manifest of layer shapes ({error!r}). Delete it to have the weights' shapes used."
        ) from error
    if content != odd:
        wrong = sorted(key for key in {*content, *odd} if content.get(key) != odd.get(key))
        raise CheckpointError(
            f"{path}: {wrong[0]} has {content.get(wrong[0])} in this file but {odd.get(wrong[0])} in the weights. "
            "Delete the file to have the weights' shapes used."
        )
