"""LLM-Pruner's pickle, `torch.save({"model": module, "tokenizer": tokenizer})`, turned into a checkpoint folder.

Unpickling runs whatever code the file names. Nothing else in the project unpickles, and this does it only when its user
says that the file is trusted. Of the module, only the tensors and the configuration's values are taken: it was made by
whatever transformers the tool ran with.
"""

import logging
import shutil
from pathlib import Path

from coppice import models
from coppice.core import records
from coppice.core.errors import CheckpointError
from coppice.models import pruned_shapes

logger = logging.getLogger("coppice.pickles")

REMEDY = "coppice import-pickle {path} OUT --i-trust-this-file"


def convert(path, output, base=None, trusted=False):
    """Write the checkpoint in the pickle `path` to the folder `output`: safetensors, config.json, pruned_shapes.json.

    base: a folder with the model's original config.json and tokenizer, for a pickle that lacks a usable one; trusted:
    the user's word that the file may run its code. Raises CheckpointError for what is no causal language model.
    """
    path, output = Path(path), Path(output)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if not trusted:
        raise CheckpointError(
            f"{path}: a pickle runs the code that it names when it is loaded; if you trust whoever made it, say so: "
            + REMEDY.format(path=path)
        )
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output}: is not empty; name a new folder")
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
        models.load(models.Source(str(partial)))  # what would not load is told now, with its tensors
    except BaseException:
        shutil.rmtree(partial)
        raise
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return {"layers": config.num_hidden_layers, "odd_layers": len(odd), "tensors": len(state)}


def _unpickled(path):
    """(module, tokenizer or None) of a pickle; the one place in the project that runs a file's code."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling raises whatever the classes that it meets raise
        raise CheckpointError(
            f"{path}: does not unpickle: {error!r}; the packages that it was made with may have to be installed"
        ) from error
    module, tokenizer = content, None
    if isinstance(content, dict):
        module, tokenizer = content.get("model"), content.get("tokenizer")
    if not hasattr(module, "state_dict"):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__} without a model under 'model'; LLM-Pruner's form is "
            '{"model": module, "tokenizer": tokenizer}'
        )
    return module, tokenizer


def _config(path, module, base):
    """A configuration of today's transformers from the values of the module's, or that of the folder `base`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if base is not None:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
    else:
        values = dict(getattr(module, "config", None).__dict__) if hasattr(module, "config") else {}
        kind = values.get("model_type") or getattr(getattr(module, "config", None), "model_type", None)
        if kind not in pruned_shapes.FAMILIES:
            raise CheckpointError(
                f"{path}: its model is of type {kind!r}; known are {', '.join(pruned_shapes.FAMILIES)} "
                "(or name a folder with the original config.json: --base FOLDER)"
            )
        plain = {key: value for key, value in values.items() if not key.startswith("_") and _is_plain(value)}
        try:
            config = AutoConfig.for_model(kind, **{k: v for k, v in plain.items() if k != "model_type"})
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: its configuration is not one that transformers takes now ({error}); "
                "name a folder with the original config.json: --base FOLDER"
            ) from error
    config.num_hidden_layers = len({name.split(".")[2] for name in module.state_dict() if ".layers." in f".{name}"})
    return config


def _is_plain(value):
    return value is None or isinstance(value, bool | int | float | str | list | dict)


def _write(folder, config, state):
    from safetensors.torch import save_file

    config.architectures = [_architecture(config)]
    config.save_pretrained(folder)
    kept = {name: tensor for name, tensor in state.items() if "rotary_emb" not in name}
    head, embedding = kept.get("lm_head.weight"), kept.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and head.equal(embedding):
        del kept["lm_head.weight"]
    seen = {}
    for name, tensor in kept.items():  # two names of one tensor are written as two
        kept[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen[tensor.data_ptr()] = name
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    records.as_new_files(folder)


def _architecture(config):
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__


def _write_tokenizer(path, folder, tokenizer, base):
    if base is not None:
        models.load_tokenizer(base).save_pretrained(folder)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        raise CheckpointError(f"{path}: holds no tokenizer; name a folder with the original model's: --base FOLDER")
    models.load_tokenizer(folder)
