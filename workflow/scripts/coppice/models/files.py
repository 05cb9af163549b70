"""What can be told of a checkpoint folder before its weights are loaded: whether its files are whole and fit together.

Only small files and headers are read, and neither torch nor transformers is imported: the jobs that register a model
or a user's candidate do this, so that a torn file is told before anything computes on it. `same_tensors` alone reads
weights, where names and shapes do not tell two checkpoints apart.
"""

import math
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from coppice.core import fingerprints
from coppice.core.errors import CheckpointError
from coppice.core.json_text import parsed

from . import pruned_shapes

# Files that hold a JSON object where they are there
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "*.index.json")
VOCABULARIES = ("*.model", "vocab*", "merges*", "*.tiktoken")  # of tokenizers without a tokenizer.json
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
REMEDY = "copy or fetch the checkpoint again"


def check(folder):
    """Refuse a folder without a readable configuration, with torn weights, or with weights of other sizes.

    An index that names files outside the folder is refused too: their content would be in no fingerprint. Raises
    CheckpointError that names the file.
    """
    folder = Path(folder)
    try:
        found = (folder / "config.json").is_file()
    except PermissionError as error:
        raise CheckpointError(
            f"{folder}: {error.strerror}; give the account that runs this the right to read it"
        ) from error
    if not found:
        raise CheckpointError(f"{folder}: is not a checkpoint folder (it has no config.json)")
    found = {path.name: _object(path) for name in OBJECTS for path in sorted(folder.glob(name)) if path.is_file()}
    for name, content in found.items():
        if name.endswith(".index.json") and name.endswith(_index_of(folder)):
            _check_index(folder / name, content)
    shapes, config = pruned_shapes.tensor_shapes(folder), found["config.json"]
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {config['model_type']!r}, and has to be a name")
    if shapes and config.get("model_type") in pruned_shapes.FAMILIES and not config.get("quantization_config"):
        _check_sizes(folder / "config.json", config, shapes)


def _index_of(folder):
    """How the index of the weights ends that are read: beside safetensors one of `.bin` files may lie without them."""
    return ".safetensors.index.json" if any(folder.glob("*.safetensors")) else ".bin.index.json"


def check_tokenizer(folder):
    """Refuse a folder without a tokenizer, or with a torn `tokenizer.json`; CheckpointError names it."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error}); {REMEDY}") from error
        return
    if not _own_code(folder) and not any(path.is_file() for name in VOCABULARIES for path in folder.glob(name)):
        raise CheckpointError(
            f"{folder}: holds no tokenizer; put the original model's tokenizer files beside the weights"
        )


def same_tensors(one, other):
    """Whether two folders of safetensors hold the same tensors, in whatever shards; False for other formats.

    Weights are read up to the first tensor that differs, small ones first.
    """
    shapes = pruned_shapes.tensor_shapes(one)
    if shapes is None or shapes != pruned_shapes.tensor_shapes(other):
        return False
    import torch  # seconds, which only weights of equal shapes cost

    with ExitStack() as opened:
        first, second = (_files_of_tensors(opened, folder) for folder in (one, other))
        for name in sorted(shapes, key=lambda name: math.prod(shapes[name])):
            mine, theirs = first[name].get_tensor(name), second[name].get_tensor(name)
            if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
                return False
    return True


def _files_of_tensors(opened, folder):
    """tensor name -> the open safetensors file that holds it."""
    from safetensors import safe_open

    files = [opened.enter_context(safe_open(path, "pt")) for path in fingerprints.weights_files(folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def has_chat_template(folder):
    """Whether the tokenizer in a folder has a chat template; None where code of its own may bring one."""
    folder = Path(folder)
    if _own_code(folder):
        return None
    settings = folder / "tokenizer_config.json"
    return any(folder.glob("chat_template*")) or bool(settings.is_file() and _object(settings).get("chat_template"))


def _own_code(folder):
    return "auto_map" in _object(folder / "config.json") or any(folder.glob("tokenization_*.py"))


def _object(path):
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); {REMEDY}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: does not hold what its name says (a JSON object); {REMEDY}")
    return content


def _check_index(path, content):
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{path}: has no weight_map of tensors and files; {REMEDY}")
    for name in sorted(set(names.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: names the file '{name}', which is not one of its folder")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: names the file {name}, which is not there; {REMEDY}")


def _check_sizes(path, config, shapes):
    for key in (*SIZES, *OPTIONAL_SIZES):
        value = config.get(key)
        missing = value is None and key in OPTIONAL_SIZES
        if not missing and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise CheckpointError(f"{path}: {key} is {value!r}, and has to be a number of at least 1; {REMEDY}")
    embedding = shapes.get("model.embed_tokens.weight")
    wanted = (config["vocab_size"], config["hidden_size"])
    if embedding is not None and embedding != wanted:
        raise CheckpointError(
            f"{path}: vocab_size and hidden_size are {wanted[0]} and {wanted[1]}, the weights' embedding is "
            f"{embedding}: its config.json and its weights do not belong together"
        )
    parts = [name.split(".")[2] for name in shapes if name.startswith("model.layers.")]
    layers = [int(part) for part in parts if part.isdigit()]
    if layers and max(layers) >= config["num_hidden_layers"]:
        raise CheckpointError(
            f"{path}: num_hidden_layers is {config['num_hidden_layers']}, and the weights have a layer {max(layers)} "
            "(counted from 0): its config.json and its weights do not belong together"
        )
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    pruned_shapes.layers_of(path.parent, SimpleNamespace(**config | {"num_key_value_heads": heads}))
