"""Find out which blocks of an encoder-decoder's checkpoint have other widths than its configuration says.

T5's configuration has one width for the MLPs of both stacks and one number of heads, so a stack that was narrowed by
itself does not fit it; neither do blocks of different widths. `pruned_shapes.json` lists these blocks as "encoder.0",
"decoder.2" and so on. This module does not import torch; `stack_building` builds the model.
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
SHARED = {CROSS: "num_heads"}  # key of a block -> key of the configuration


class _Stack(NamedTuple):
    """Where a stack keeps its widths.

    blocks: the configuration's key for the number of blocks.
    prefix: of the names of a block's tensors.
    tensors: key -> (name of a tensor in the block, the dimension that shows the width).
    """

    blocks: str
    prefix: str
    tensors: Mapping[str, tuple[str, int]]


def _t5(name: str, blocks: str, mlp: int) -> _Stack:
    tensors = {"d_ff": (f"layer.{mlp}.DenseReluDense.wo", 1), "num_heads": ("layer.0.SelfAttention.q", 0)}
    if mlp == 2:
        tensors[CROSS] = ("layer.1.EncDecAttention.q", 0)
    return _Stack(blocks, f"{name}.block.", tensors)


def _bart(name: str) -> _Stack:
    return _Stack(f"{name}_layers", f"model.{name}.layers.", {f"{name}_ffn_dim": ("fc1", 0)})


_T5 = {"encoder": _t5("encoder", "num_layers", 1), "decoder": _t5("decoder", "num_decoder_layers", 2)}
_BART = {name: _bart(name) for name in ("encoder", "decoder")}
STACKS = {"t5": _T5, "mt5": _T5, "bart": _BART, "mbart": _BART}


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
        blocks = getattr(config, stack.blocks, None) or config.num_layers
        for index in range(blocks):
            found[f"{name}.{index}"] = own = _widths(folder, f"{stack.prefix}{index}.", stack, shapes, config)
            uniform = {key: getattr(config, SHARED.get(key, key)) for key in own}
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
        width = config.d_kv if key in ("num_heads", CROSS) else 1
        if shape[dim] % width:
            raise CheckpointError(
                f"{folder}: {prefix}{tensor} has {shape[dim]} rows, which is not a multiple of d_kv {width}. Prune "
                "whole heads."
            )
        widths[key] = shape[dim] // width
    return widths


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
