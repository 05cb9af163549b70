"""Count the parameters of a model: those of the model itself, not the tensors of its file.

A file may hold a tied tensor twice, buffers that no longer exist, or quantized weights in packed form. So a checkpoint
is counted by building its model without weights, from transformers' own classes: nothing in the checkpoint is executed.
"""

from __future__ import annotations

import logging
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core import fingerprints
from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError

from . import files, loading, pruned_shapes
from .library_errors import described

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger("coppice.models")

Shapes = dict[str, tuple[int, ...]]


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a loaded model; tied ones count once, and quantized ones as if unpacked."""
    from torch import nn

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = {id(m.weight): m.in_features * m.out_features for m in linears if not m.weight.is_floating_point()}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def count_parameters(folder: PathLike) -> int:
    """Return the number of parameters of the model in a checkpoint folder, without loading its weights.

    The model comes from config.json. A parameter that is stored under its own name has the size of the stored tensor,
    which differs if a pruning tool left config.json as it was. If transformers cannot build the model without the
    checkpoint's own code, the tensors of the file are counted.

    Raises:
        CheckpointError: a file is damaged, or config.json and the weights do not belong together.
    """
    files.check(folder)
    stored = _stored_shapes(folder)
    try:
        model = loading.skeleton(loading.Source(str(folder)))
    except CheckpointError:
        raise
    except Exception as error:  # with an unknown architecture or unusual values, transformers raises any kind of error
        logger.warning(
            "%s: counting the tensors of its files, as the model is not known (%s)", folder, described(error)
        )
        return _count_in_files(folder, stored)
    # the names of packed weights are those of the parameters, but not their shapes
    return _count(model, {} if _config(folder).get("quantization_config") else stored, folder)


def _count(model: nn.Module, stored: Shapes, folder: PathLike) -> int:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    total = 0
    for parameter in model.parameters():
        found = [name for name in names[id(parameter)] if name in stored]
        sizes = [math.prod(stored[name]) for name in found] or [parameter.numel()]
        # transformers ties what is stored twice only if both are equal, whatever the configuration says
        total += sizes[0] if len(sizes) == 1 else sum(sizes[place] for place in _distinct(folder, found))
    return total


def _count_in_files(folder: PathLike, stored: Shapes) -> int:
    """Return the number of stored values, without rotary frequencies and an output layer that is tied."""
    tied = bool(_config(folder).get("tie_word_embeddings"))
    left_out = ("inv_freq", "lm_head.weight") if tied else ("inv_freq",)
    return sum(math.prod(shape) for name, shape in stored.items() if not name.endswith(left_out))


def _stored_shapes(folder: PathLike) -> Shapes:
    shapes = pruned_shapes.tensor_shapes(folder)
    if shapes is not None:
        return shapes
    content = [item for path in fingerprints.weights_files(folder) for item in _read_bin(path, "meta").items()]
    shapes = {name: tuple(tensor.shape) for name, tensor in content if hasattr(tensor, "shape")}
    if not shapes:  # loading finds this too, but only when the model is first used
        names = ", ".join(str(name) for name, _ in content)
        raise CheckpointError(
            f"{folder}: its weights hold no tensors at the top level, only {names}. Save the state dict alone as "
            "pytorch_model.bin."
        )
    return shapes


def _distinct(folder: PathLike, names: list[str]) -> list[int]:
    """Return the places of the names whose tensors differ from those of all earlier names.

    Tensors that `.bin` files share are not compared.
    """
    import torch

    tensors = [_tensor(folder, name) for name in names]

    def known(place: int) -> bool:
        new = tensors[place]
        return any(one.data_ptr() == new.data_ptr() or torch.equal(one, new) for one in tensors[:place])

    return [place for place in range(len(names)) if not known(place)]


def _tensor(folder: PathLike, name: str) -> torch.Tensor:
    from safetensors import safe_open

    for path in fingerprints.weights_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118
                    return file.get_tensor(name)
        elif name in (content := _read_bin(path, "cpu")):
            return content[name]
    raise KeyError(name)


def _read_bin(path: Path, place: str) -> dict[str, Any]:
    """Return what a `.bin` file holds; memory-mapped if it is in torch's zip format, so that weights are not read."""
    import torch

    try:
        content = torch.load(path, map_location=place, weights_only=True, mmap=zipfile.is_zipfile(path))
        return dict(content.items())
    except Exception as error:  # a damaged file can fail in torch, in zipfile or in the restricted unpickler
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint's tensors ({described(error)}). Copy it again."
        ) from error


def _config(folder: PathLike) -> dict[str, Any]:
    return files.json_object(Path(folder) / "config.json")
