"""Build the model that fits a checkpoint with odd shapes (see `stacks`), and fill it with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig

from coppice.core import fingerprints
from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError

from .. import kinds
from ..towers import Part
from .stacks import Widths

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SHARE_THE_EMBEDDING = ("embed_tokens.weight", "lm_head.weight")  # how the names of tensors end that may be tied to it


def load(folder: PathLike, config: PretrainedConfig, odd: Mapping[str, Widths], dtype: torch.dtype) -> PreTrainedModel:
    """Load the model of a checkpoint with odd shapes, on the CPU.

    Args:
        folder: the checkpoint.
        config: its configuration, which holds the uniform widths.
        odd: block -> widths, as from `stacks.layers_of`.
        dtype: of all floating-point weights.

    Raises:
        CheckpointError: if the configuration and the weights do not match.
    """
    with torch.device("meta"):
        model = kinds.of(config).auto_class().from_config(config, dtype=dtype)
    shape(model, odd)
    state: dict[str, torch.Tensor] = {}
    for path in fingerprints.weights_files(folder):
        state |= load_file(path)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    embedding = next((tensor for name, tensor in state.items() if name.endswith("shared.weight")), None)
    # files hold one of several tied tensors; an output layer that they hold besides is one of its own
    stored = model.state_dict() if embedding is not None else ()
    tied = [name for name in stored if name not in state and name.endswith(SHARE_THE_EMBEDDING)]
    state |= dict.fromkeys(tied, embedding)
    try:
        # `assign`, because nothing can be copied into a meta tensor; `strict` reports what is missing or left over
        model.load_state_dict(state, assign=True, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its config.json and its weights do not match: {error}") from error
    for name in tied:
        model.get_submodule(name.rpartition(".")[0]).weight = model.get_input_embeddings().weight
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name.endswith("position_ids"):  # no file has these, so they are still on meta
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1]).expand((1, -1))
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.name_or_path = str(folder)
    return model


def shape(model: PreTrainedModel, odd: Mapping[str, Widths]) -> None:
    """Give every block in `odd` its own widths: tensors of the new shape, on the device of the old, without values."""
    for tower in kinds.of(model.config).towers(model):
        for index, block in enumerate(tower.blocks):
            widths = odd.get(f"{tower.anatomy.name}.{index}", {})
            for part in tower.parts.values():
                (key,) = part.sizes(block, 0)
                if key in widths:
                    _resize(block, part, widths[key])


def _resize(block: nn.Module, part: Part, count: int) -> None:
    for coupling in list(part.couplings(block)):
        size = list(coupling.tensor.shape)
        size[coupling.dim] = count * coupling.width
        setattr(coupling.owner, coupling.name, nn.Parameter(coupling.tensor.new_empty(size)))
    part.resized(block, count)
