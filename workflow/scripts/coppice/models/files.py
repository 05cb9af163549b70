"""Check, before a checkpoint's weights are loaded, that its files are complete and fit together.

The jobs that register a model or a user's candidate call this, so that a damaged file is reported before anything
computes with it. Only small files and headers are read, and neither torch nor transformers is imported. Only
`same_tensors` reads weights, if names and shapes are not enough to distinguish two checkpoints.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from coppice.core import fingerprints
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CheckpointError
from coppice.core.json_text import parsed

from . import pickles, pruned_shapes

if TYPE_CHECKING:
    from safetensors import safe_open

    from .pruned_shapes import Shapes

# Files that must hold a JSON object if they exist
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "*.index.json")
VOCABULARIES = ("*.model", "vocab*", "merges*", "*.tiktoken")  # of tokenizers that have no tokenizer.json
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
REMEDY = "Copy or fetch the checkpoint again."


def check(folder: PathLike) -> None:
    """Reject a folder without a readable configuration, with damaged weights, or with weights of other sizes.

    An index that names files outside the folder is also rejected, because no fingerprint would cover their content.

    Raises:
        CheckpointError: names the file.
    """
    folder = Path(folder)
    try:
        is_there = (folder / "config.json").is_file()
    except PermissionError as error:
        raise CheckpointError(
            f"{folder}: {error.strerror}. Give the account that runs this job the right to read the folder."
        ) from error
    if not is_there:
        raise CheckpointError(f"{folder}: is not a checkpoint folder, because it has no config.json")
    found = {path.name: json_object(path) for name in OBJECTS for path in sorted(folder.glob(name)) if path.is_file()}
    for name, content in found.items():
        if name.endswith(".index.json") and name.endswith(_index_of(folder)):
            _check_index(folder / name, content)
    _check_pickles(folder)
    shapes, config = pruned_shapes.tensor_shapes(folder), found["config.json"]
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {config['model_type']!r}, but must be a name")
    if shapes and config.get("model_type") in pruned_shapes.FAMILIES and not config.get("quantization_config"):
        _check_sizes(folder / "config.json", config, shapes)


def _check_pickles(folder: Path) -> None:
    """Reject weights that are pickled objects, and weights under names that nothing reads."""
    if any(folder.glob("*.safetensors")):
        return
    try:
        weights = fingerprints.weights_files(folder)
    except CheckpointError:
        weights = sorted(path for path in folder.iterdir() if path.suffix.lower() in pickles.SUFFIXES)
        for path in weights:
            pickles.check(path)
        if weights:
            raise CheckpointError(
                f"{folder}: has neither safetensors weights nor a pytorch_model.bin, but {weights[0].name}. Load the "
                "model with your own code and write it with save_pretrained."
            ) from None
        raise
    for path in weights:
        pickles.check(path)


def _index_of(folder: Path) -> str:
    """Return the ending of the index that belongs to the weights that are read.

    A folder with safetensors may also hold an index of `.bin` files that are not there.
    """
    return ".safetensors.index.json" if any(folder.glob("*.safetensors")) else ".bin.index.json"


def check_tokenizer(folder: PathLike) -> None:
    """Reject a folder without a tokenizer, or with a damaged `tokenizer.json`; the CheckpointError names it."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no more specific type
            raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error}). {REMEDY}") from error
        return
    if not _own_code(folder) and not any(path.is_file() for name in VOCABULARIES for path in folder.glob(name)):
        raise CheckpointError(
            f"{folder}: has no tokenizer. Put the original model's tokenizer files beside the weights."
        )


def same_tensors(one: PathLike, other: PathLike) -> bool:
    """Return whether two folders of safetensors hold the same tensors, in any shards; False for other formats.

    Weights are read up to the first tensor that differs, small tensors first.
    """
    shapes = pruned_shapes.tensor_shapes(one)
    if shapes is None or shapes != pruned_shapes.tensor_shapes(other):
        return False
    import torch  # takes seconds, so only weights of equal shapes get this far

    with ExitStack() as opened:
        first, second = (_files_of_tensors(opened, folder) for folder in (one, other))
        for name in sorted(shapes, key=lambda name: math.prod(shapes[name])):
            mine, theirs = first[name].get_tensor(name), second[name].get_tensor(name)
            if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
                return False
    return True


def _files_of_tensors(opened: ExitStack, folder: PathLike) -> dict[str, safe_open]:
    """Return tensor name -> the open safetensors file that holds it."""
    from safetensors import safe_open

    files = [opened.enter_context(safe_open(path, "pt")) for path in fingerprints.weights_files(folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def has_chat_template(folder: PathLike) -> bool | None:
    """Return whether the tokenizer in a folder has a chat template; None if its own code may bring one."""
    folder = Path(folder)
    if _own_code(folder):
        return None
    settings = folder / "tokenizer_config.json"
    return any(folder.glob("chat_template*")) or bool(settings.is_file() and json_object(settings).get("chat_template"))


def _own_code(folder: Path) -> bool:
    return "auto_map" in json_object(folder / "config.json") or any(folder.glob("tokenization_*.py"))


def json_object(path: Path, remedy: str = REMEDY) -> Record:
    """Return the content of a JSON file; raise CheckpointError, with the `remedy`, if it is damaged or no mapping."""
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: does not hold a JSON object. {remedy}")
    return content


def _check_index(path: Path, content: Record) -> None:
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{path}: has no weight_map from tensors to files. {REMEDY}")
    for name in sorted(set(names.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{path}: names the file '{name}', which is not in its folder. Move it there and correct the name."
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: names the file {name}, which does not exist. {REMEDY}")


def _check_sizes(path: Path, content: Record, shapes: Shapes) -> None:
    # an image-text model keeps the sizes of its text tower apart
    text = content.get("text_config")
    config = text | {"model_type": content["model_type"]} if isinstance(text, dict) else content
    for key in (*SIZES, *OPTIONAL_SIZES):
        value = config.get(key)
        missing = value is None and key in OPTIONAL_SIZES
        if not missing and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise CheckpointError(f"{path}: {key} is {value!r}, but must be an integer of at least 1. {REMEDY}")
    prefix = pruned_shapes.layer_prefix(shapes)
    embedding = shapes.get(prefix.replace("layers.", "embed_tokens.weight"))
    wanted = (config["vocab_size"], config["hidden_size"])
    if embedding is not None and embedding != wanted:
        raise CheckpointError(
            f"{path}: vocab_size and hidden_size are {wanted[0]} and {wanted[1]}, but the embedding of the weights is "
            f"{embedding}. Use the config.json that belongs to these weights."
        )
    parts = [name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)]
    layers = [int(part) for part in parts if part.isdigit()]
    if layers and max(layers) >= config["num_hidden_layers"]:
        raise CheckpointError(
            f"{path}: num_hidden_layers is {config['num_hidden_layers']}, but the weights have a layer {max(layers)} "
            "(counted from 0). Use the config.json that belongs to these weights."
        )
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    pruned_shapes.layers_of(path.parent, SimpleNamespace(**config | {"num_key_value_heads": heads}))
