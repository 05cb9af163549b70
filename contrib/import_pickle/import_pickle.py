"""Convert LLM-Pruner's pickle, `torch.save({"model": module, "tokenizer": tokenizer})`, to a checkpoint folder.

    python contrib/import_pickle/import_pickle.py pytorch_model.bin FOLDER --i-trust-this-file

Unpickling runs whatever code the file names. Nothing else in the project unpickles, and this program does so only if
the user says that the file is trusted. It takes the tensors and the plain configuration values from the module and
nothing else, because another version of transformers may have written it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike

# The package of this checkout comes before one that is installed in the environment, as in the workflow's scripts.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "workflow" / "scripts"))

from coppice import models
from coppice.core import disks, records
from coppice.core.errors import CheckpointError, CoppiceError
from coppice.models import pruned_shapes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the pickle that the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="import_pickle.py", description="Convert LLM-Pruner's pickle to a checkpoint folder for candidates.table."
    )
    parser.add_argument("pickle", metavar="IN", help="the pickle: torch.save({'model': ..., 'tokenizer': ...})")
    parser.add_argument("output", metavar="OUT", help="the checkpoint folder to write")
    parser.add_argument("--base", metavar="FOLDER", help="the original model's folder, for its config and tokenizer")
    parser.add_argument(
        "--i-trust-this-file",
        action="store_true",
        help="confirm that you trust the file: loading a pickle runs the code that it names",
    )
    given = parser.parse_args(argv)
    try:
        facts = convert(given.pickle, given.output, given.base, given.i_trust_this_file)
    except (CoppiceError, OSError) as error:
        message = str(error) if isinstance(error, CoppiceError) else disks.explained(error, [given.output])
        if message is None:
            raise
        print(f"import_pickle.py: {message}", file=sys.stderr)
        return 1
    print(
        f"{given.output}: {facts['tensors']} tensors, {facts['layers']} layers, "
        f"{facts['odd_layers']} of them with other widths than the config"
    )
    return 0


def convert(path: PathLike, output: PathLike, base: PathLike | None = None, trusted: bool = False) -> dict[str, int]:
    """Write the model in the pickle `path` to the folder `output` as safetensors, config.json and pruned_shapes.json.

    Args:
        path: the pickle.
        output: folder to write; must be new or empty.
        base: folder with the model's original config.json and tokenizer, for a pickle that lacks usable ones.
        trusted: True if the user allows the file to run its code.

    Returns:
        Numbers of layers, of odd-shaped layers and of tensors.

    Raises:
        CheckpointError: the file is not trusted, or it holds no causal language model.
    """
    path, output = Path(path), Path(output)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file. Give the path of the pickle.")
    if not trusted:
        raise CheckpointError(
            f"{path}: loading a pickle runs the code that it names. If you trust whoever made it, add "
            "--i-trust-this-file to the command."
        )
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output}: the folder is not empty. Name a new folder.")
    module, tokenizer = _unpickled(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    config = _config(path, module, base)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, config, state)
        _write_tokenizer(path, partial, tokenizer, base)
        odd = pruned_shapes.write_manifest(partial, config)
        models.load(models.Source(str(partial)))  # find out now, rather than in the study, if it does not load
    except BaseException:
        shutil.rmtree(partial)
        raise
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return {"layers": config.num_hidden_layers, "odd_layers": len(odd), "tensors": len(state)}


def _unpickled(path: Path) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """Return (module, tokenizer or None) from a pickle. This is the only function that runs a file's code."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the pickled classes run their own code, which can raise anything
        raise CheckpointError(
            f"{path}: does not unpickle: {error!r}. It may need the packages that it was made with; install them."
        ) from error
    module, tokenizer = content, None
    if isinstance(content, dict):
        module, tokenizer = content.get("model"), content.get("tokenizer")
    if not hasattr(module, "state_dict"):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__} without a model under 'model'. Save it as LLM-Pruner does: "
            '{"model": module, "tokenizer": tokenizer}'
        )
    return module, tokenizer


def _config(path: Path, module: nn.Module, base: PathLike | None) -> PretrainedConfig:
    """Return the configuration in the folder `base`, or else one built from the values of the module's own."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if base is not None:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
    else:
        values = dict(getattr(module, "config", None).__dict__) if hasattr(module, "config") else {}
        kind = values.get("model_type") or getattr(getattr(module, "config", None), "model_type", None)
        if kind not in pruned_shapes.FAMILIES:
            raise CheckpointError(
                f"{path}: the model is of type {kind!r}, which is not one of {', '.join(pruned_shapes.FAMILIES)}. "
                "Name a folder with the original config.json: --base FOLDER"
            )
        plain = {key: value for key, value in values.items() if not key.startswith("_") and _is_plain(value)}
        try:
            config = AutoConfig.for_model(kind, **{k: v for k, v in plain.items() if k != "model_type"})
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the installed transformers does not accept the model's configuration ({error}). "
                "Name a folder with the original config.json: --base FOLDER"
            ) from error
    # Pruning may have removed layers without updating the configuration: count those that have tensors.
    config.num_hidden_layers = len({name.split(".")[2] for name in module.state_dict() if ".layers." in f".{name}"})
    return config


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | dict)


def _write(folder: Path, config: PretrainedConfig, state: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    config.architectures = [_architecture(config)]
    config.save_pretrained(folder)
    # Older versions of transformers saved the rotary embedding's buffers, which newer ones compute themselves.
    kept = {name: tensor for name, tensor in state.items() if "rotary_emb" not in name}
    head, embedding = kept.get("lm_head.weight"), kept.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and head.equal(embedding):
        del kept["lm_head.weight"]
    seen = {}
    for name, tensor in kept.items():
        # safetensors refuses tensors that share memory, so a tensor with two names is written twice.
        kept[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen[tensor.data_ptr()] = name
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    records.as_new_files(folder)


def _architecture(config: PretrainedConfig) -> str:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__


def _write_tokenizer(
    path: Path, folder: Path, tokenizer: PreTrainedTokenizerBase | None, base: PathLike | None
) -> None:
    if base is not None:
        models.load_tokenizer(base).save_pretrained(folder)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        raise CheckpointError(f"{path}: holds no tokenizer. Name a folder with the original one: --base FOLDER")
    models.load_tokenizer(folder)  # find out now if the tokenizer does not load


if __name__ == "__main__":
    sys.exit(main())
