"""Put a LoRA adapter on a model, or raise an error that says why it does not fit.

peft loads what fits: a tensor without a place in the model is dropped, and an adapted layer without a tensor keeps its
initial values. Here both are errors, as are other shapes, NaN, a damaged file, and another base than the adapter was
trained on. Every part of Coppice that puts an adapter on a model comes through this module.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError

from . import files, kinds, pruned_shapes
from .library_errors import described

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger("coppice.models")

CONFIG = "adapter_config.json"
RECORD = "finetuning_config.json"  # what a training writes beside its adapter
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which peft looks for them
PREFIX = "base_model.model."  # of every name in a file that peft writes
SHOWN = 4  # tensors that an error names
# Names that contain the adapter's own name, as in the state dict of a whole peft model -> names as peft saves them
RENAMED = (
    (re.compile(r"(\.lora_(?:A|B))\.[^.]+(?=\.(?:weight|bias)$)"), r"\1"),
    (re.compile(r"(\.lora_(?:embedding_A|embedding_B|magnitude_vector))\..+$"), r"\1"),
    (re.compile(r"\.modules_to_save\.[^.]+(?=\.)"), ""),
    (re.compile(r"^(?!base_model\.)"), PREFIX),
)
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# The factor of each product that is zero before training
ZERO_AT_FIRST = ("lora_B", "lora_embedding_A")


def check_origin(folder: PathLike, base: PathLike) -> None:
    """Check that an adapter is as its training wrote it, and that `base` is the checkpoint that it was trained on.

    The record of the training names both by fingerprint. Without one there is only the path of the base: it is an error
    if the checkpoint there has other tensors than `base`, and a warning if it has other values or is not there.

    Args:
        folder: the adapter.
        base: the folder of the checkpoint that it is to be put on.

    Raises:
        CheckpointError: the adapter's files were changed, or it was trained on another base.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        _check_path(folder, _config(folder).get("base_model_name_or_path"), base)
        return
    record = records.read(folder / RECORD)
    if record["trained_fingerprint"] != fingerprints.weights(folder):
        raise CheckpointError(
            f"{folder}: adapter_model.safetensors or adapter_config.json was changed after training (the fingerprint "
            f"differs). Run: snakemake --forcerun finetune_lora {folder / RECORD} (if the training was finished, this "
            "restores the adapter from its checkpoint)"
        )
    named = _config(folder).get("base_model_name_or_path")
    trained_on = record["provenance"]["fingerprints"]["weights"]
    if trained_on != fingerprints.weights(base) and not _holds_same_tensors(named, base):
        raise CheckpointError(
            f"{folder}: the adapter was trained on {named} (fingerprint {trained_on[:12]}), but {base} has other "
            f"weights ({fingerprints.weights(base)[:12]}). Put the adapter on the model that it was trained on, or "
            "train it on this one."
        )


def recorded_settings(folder: PathLike) -> dict[str, Any]:
    """Return the settings of an adapter's training from its record; {} if it was not trained here."""
    path = Path(folder) / RECORD
    return records.read(path).get("settings", {}) if path.is_file() else {}


def load_adapter(model: nn.Module, folder: PathLike, train: bool = False) -> nn.Module:
    """Put the LoRA adapter in `folder` on `model`.

    Args:
        model: a loaded model, which becomes a part of the returned one.
        folder: the adapter.
        train: whether the adapter's weights get gradients.

    Raises:
        CheckpointError: the adapter does not fit the model in every tensor, changes nothing, or cannot be read.
    """
    from peft import PeftModel

    folder, base = Path(folder), model.config.name_or_path
    _check_config(folder, kinds.of(model.config).task_type)
    tensors = read(folder)
    with _saved_as_today(folder, tensors) as place:
        try:
            # `fill` reports tensors of another shape; without this option peft stops at them with a long text
            options = {"is_trainable": train, "local_files_only": True, "ignore_mismatched_sizes": True}
            model = PeftModel.from_pretrained(model, str(place), **options)
        except Exception as error:  # peft does not check its files, so a damaged one raises any kind of error
            reason = f"the tensor {error} is missing" if isinstance(error, KeyError) else described(error)
            raise CheckpointError(f"{folder}: the adapter does not fit its base model ({base}): {reason}") from error
    fill(model, tensors, folder)
    _check_finite(tensors, folder, base)
    if not any(_acts(name, tensor) for name, tensor in tensors.items()):
        raise CheckpointError(f"{folder}: the adapter changes nothing, because all its B matrices are zero or missing")
    model.adapter_folder = str(folder)
    return model


def read(folder: PathLike) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter on the CPU, under the names that peft gives them today.

    Raises:
        CheckpointError: the folder has no weights, none that can be read, or a file without tensors.
    """
    import torch
    from safetensors.torch import load_file

    path = next((Path(folder) / name for name in WEIGHTS if (Path(folder) / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder}: has no weights of an adapter ({' or '.join(WEIGHTS)}). Copy it again.")
    try:
        safe = path.suffix == ".safetensors"
        found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        tensors = {current_name(name): tensor for name, tensor in found.items()}
        readable = all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    except Exception as error:  # a damaged file can fail in safetensors, in zipfile or in the restricted unpickler
        raise CheckpointError(
            f"{path}: cannot be read as an adapter's tensors ({described(error)}). Copy it again."
        ) from error
    if not tensors or not readable:
        raise CheckpointError(f"{path}: holds no adapter, only {len(found)} entries. Copy it again.")
    return tensors


def current_name(name: str) -> str:
    """Return a tensor's name as peft saves it today: with its prefix, and without the adapter's own name."""
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: PathLike) -> None:
    """Copy an adapter's tensors into a peft model.

    Args:
        model: with an adapter of the same configuration.
        tensors: as from `read`.
        folder: where they come from, for the message.

    Raises:
        CheckpointError: a tensor has no place or another shape, or a place has no tensor.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = model.peft_config["default"]
    try:
        result = set_peft_model_state_dict(model, dict(tensors), ignore_mismatched_sizes=True)
    except KeyError as error:
        raise CheckpointError(f"{folder}: the adapter lacks the tensor {error}. Copy it again.") from error
    # `save_embedding_layers` would ask the hub for the size of the vocabulary
    places = model.state_dict() | get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = [(name, tuple(t.shape), tuple(places[name].shape)) for name, t in tensors.items() if name in places]
    reshaped = [f"{name} {found} instead of {wanted}" for name, found, wanted in shapes if found != wanted]
    missing = [name for name in result.missing_keys if _belongs(name, config.bias)] if not reshaped else []
    wrong = {
        "without a place in the model": result.unexpected_keys,
        "of another shape": reshaped,
        "missing": missing,
    }
    if found := [f"{len(names)} tensors {what}: {_listed(names)}" for what, names in wrong.items() if names]:
        raise CheckpointError(
            f"{folder}: the adapter does not fit its base model ({model.config.name_or_path}): {'; '.join(found)}. Put "
            "it on the model that it was trained on, or train one on this model."
        )


def parameters(model: nn.Module) -> int:
    """Return how many parameters an adapter adds to its base; 0 for a model without one.

    The copies of modules that are trained whole count, and so do the originals that they replace.
    """
    return sum(p.numel() for name, p in model.named_parameters() if _is_added(name))


def _is_added(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name or ".trainable_tokens_" in name


def _belongs(name: str, bias: str) -> bool:
    """Return whether a tensor of a peft model must come from the file. bias: which biases were trained."""
    trained_bias = name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and ".base_layer." in name))
    return (_is_added(name) and ".default" in name) or trained_bias


def _acts(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor changes the model: the factor that starts at zero is not, or a weight was trained."""
    if not any(f".{factor}" in name for factor in FACTORS):
        return True
    return any(f".{factor}" in name for factor in ZERO_AT_FIRST) and bool(tensor.any())


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_finite(tensors: Mapping[str, torch.Tensor], folder: Path, base: str) -> None:
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{folder} on {base}: {len(broken)} of the adapter's tensors are not finite numbers: {_listed(broken)}. If "
            "it was trained here, lower finetune.learning_rate and train again; if not, copy it again."
        )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: is not an adapter folder, because it has no {CONFIG}")
    return files.json_object(path, "Copy the adapter again.")


def _check_config(folder: Path, task_type: str | None) -> None:
    """Reject an adapter of another method than LoRA, or one that was trained for another task."""
    found = _config(folder)
    if found.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder / CONFIG}: peft_type is {found.get('peft_type')!r}, but only LoRA adapters (LORA) can be loaded."
        )
    if task_type and found.get("task_type") not in (None, task_type):
        raise CheckpointError(
            f"{folder / CONFIG}: task_type is {found['task_type']!r}, so the adapter was trained for another task "
            f"than this kind of model ({task_type}). Put it on the model that it was trained on."
        )


def _check_path(folder: Path, named: str | None, base: PathLike) -> None:
    """Compare a base with the one whose path is in the adapter's configuration, as far as that is possible."""
    there = bool(named) and any(Path(named).glob("*.safetensors"))
    if there and Path(named).resolve() == Path(base).resolve():
        return
    # one of them may be a .bin file, whose shapes are unknown here
    shapes = [pruned_shapes.tensor_shapes(place) for place in (named, base)] if there else [None]
    if None not in shapes and shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{folder}: the adapter was trained on {named}, but {base} has other tensors. Put it on the model that it "
            f"was trained on. If {named} has been replaced since, correct base_model_name_or_path in {CONFIG}."
        )
    if not _holds_same_tensors(named, base):
        logger.warning(
            "%s: has no record of its training (%s), so only names and shapes show whether it fits %s. Its %s names "
            "the base %s.",
            *(folder, RECORD, base, CONFIG, named or "nowhere"),
        )


def _holds_same_tensors(named: str | None, base: PathLike) -> bool:
    """Return whether both folders hold the same tensors: in other shards, or beside a config.json edited since."""
    there = bool(named) and any(Path(named).glob("*.safetensors"))
    return there and files.same_tensors(named, base)


@contextmanager
def _saved_as_today(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Path]:
    """Yield a folder from which peft reads the tensors under their current names: a copy if they have older ones."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / WEIGHTS[0]
    if path.is_file():
        with safe_open(path, "pt") as file:
            if set(file.keys()) == set(tensors):
                yield folder
                return
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(folder / CONFIG, scratch)
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, Path(scratch) / WEIGHTS[0])
        yield Path(scratch)
