"""The one place that loads a model: from a checkpoint folder, with or without an adapter, checked for silent mismatch.

transformers re-initialises what a checkpoint lacks and only logs it; here a missing, unexpected or misshapen tensor is
an error that lists the tensors. Models come from folders alone: the fetch rules are the only ones that know the hub.
"""

import importlib.metadata
import logging
import math
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from coppice.core import disks, fingerprints, gpus, records
from coppice.core.errors import CheckpointError

from . import files, pruned_shapes

logger = logging.getLogger("coppice.models")

SHOWN = 8


@dataclass(frozen=True)
class Source:
    """Where a model lies (a folder) and how it is to be loaded."""

    path: str
    dtype: str | None = None
    quantize: str | None = None
    trust_remote_code: bool = False
    device_map: str | None = None

    @classmethod
    def of_record(cls, record, loading):
        """The source that a `model.json` record points to, with the `loading` options of the configuration.

        CheckpointError where its weights are not those that were fetched or registered.
        """
        folder, known = folder_of(record), records.read(record)["weights_fingerprint"]
        if fingerprints.weights(folder) != known:
            raise CheckpointError(
                f"{folder}: its weights or its config.json were changed since {record} was written (the fingerprint "
                "differs); put them back, or delete that record and run snakemake again to take the model as it is"
            )
        return cls(path=folder, **loading)


def folder_of(record):
    """The checkpoint folder that a `model.json` points to; one that lies beside it is found from any directory."""
    path = Path(records.read(record)["path"])
    beside = Path(record).parent / path.name
    return str(path if path.is_absolute() or not beside.is_dir() else beside)


def device():
    """The torch device of this process: the first visible GPU, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_kind():
    """ "cuda" or "cpu": what `device` will be, found without importing torch (seconds)."""
    build = importlib.metadata.version("torch")
    return "cuda" if "+cpu" not in build and gpus.count() else "cpu"


def device_memory():
    """Bytes of memory of `device`: of the first visible GPU, else of the machine."""
    import os

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def dtype_of(name):
    """The torch dtype called `name`; where it is None, bfloat16 on a GPU that has it and float32 elsewhere."""
    import torch

    if name is not None:
        return getattr(torch, name)
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load(source, adapter=None, train=False, on=None):
    """Load the causal language model of `source`, and put `adapter` (a folder) on it where one is given.

    Returns the model on this process's device (or the one called `on`), in evaluation mode unless `train`. Raises
    CheckpointError where the folder does not hold exactly the tensors that the model has.
    """
    from transformers import AutoConfig

    path = Path(source.path)
    files.check(path)
    if sys.modules.get("bitsandbytes", True) is None and "quantization_config" in (path / "config.json").read_text():
        del sys.modules["bitsandbytes"]  # a job that had no use for it leaves it out; a quantised checkpoint has one
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=source.trust_remote_code, local_files_only=True)
        odd = pruned_shapes.layers_of(path, config)
        model = _load_odd(source, config, odd, on) if odd else _load_regular(source, on)
    except CheckpointError:
        raise
    except Exception as error:  # values that nobody foresaw make transformers raise whatever comes of them
        raise CheckpointError(f"{path}: does not load as a causal language model: {_said(error)}") from error
    if adapter is not None:
        model = load_adapter(model, adapter, train)
    return model.train(train)


def skeleton(source):
    """The causal language model of `source` without memory (on torch's `meta` device): its shapes alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    files.check(source.path)
    remote = source.trust_remote_code
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=remote, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    odd = pruned_shapes.layers_of(source.path, config)
    if odd:
        from .pruned_shapes import building

        building.shape(model, odd, pruned_shapes.tensor_shapes(source.path))
    return model


def _said(error):
    """An error of a library in words: its own, after its kind where that says something."""
    return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


def _load_regular(source, on):
    """By transformers alone, refusing what it would only log."""
    from transformers import AutoModelForCausalLM

    options = {"device_map": source.device_map} if source.device_map else {}
    if source.quantize:
        options["quantization_config"] = _quantization(source.quantize, dtype_of(source.dtype))
    model, info = AutoModelForCausalLM.from_pretrained(
        source.path,
        dtype=dtype_of(source.dtype),
        trust_remote_code=source.trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are listed: `_check_complete` refuses them
        **options,
    )
    _check_complete(source.path, model, info)
    _keep_4_bit_layers_unpacked(model)
    return model if options else model.to(on or device())


def _keep_4_bit_layers_unpacked(model):
    """Have bitsandbytes compute with 4-bit layers on every CPU in one way.

    On a CPU with AVX512-BF16 it packs a layer's weights at the first forward pass without gradients, for good. Packed
    layers round to bfloat16, need widths that are multiples of 64 and 32, and pass no gradient on: a training that goes
    on after a validation would learn something else, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _load_odd(source, config, odd, on):
    """A model whose layers have widths of their own."""
    from .pruned_shapes import building

    if source.quantize:
        raise CheckpointError(f"{source.path}: its layers differ in width; such a model cannot be quantised here")
    model = building.load(source.path, config, odd, dtype_of(source.dtype))
    if not source.device_map:
        return model.to(on or device())
    from accelerate import dispatch_model, infer_auto_device_map

    return dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=model._no_split_modules))


def _quantization(kind, compute_dtype):
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def _check_complete(path, model, info):
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wrong = {
        "missing": [key for key in sorted(info["missing_keys"]) if key not in tied],
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    for what, keys in wrong.items():
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise CheckpointError(
                f"{path}: tensors {what}: {', '.join(keys[:SHOWN])}{more}; "
                "its config.json and its weights do not belong together"
            )


def load_adapter(model, folder, train=False):
    """Put the LoRA adapter in `folder` on `model`; an adapter of which nothing arrives on the model is an error."""
    from peft import PeftModel

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: is not an adapter folder (it has no adapter_config.json)")
    try:
        model = PeftModel.from_pretrained(model, folder, is_trainable=train, local_files_only=True)
    except Exception as error:  # peft raises whatever a torn or strange file makes of its own code
        raise CheckpointError(f"{folder}: the adapter does not fit its base model: {_said(error)}") from error
    if not _adapter_acts(model):
        raise CheckpointError(f"{folder}: the adapter changes nothing (all of its B matrices are zero or unmatched)")
    model.adapter_folder = str(folder)
    return model


def broken(model, found):
    """The CheckpointError to raise of a loaded model whose numbers are none; `found` says which."""
    folder, adapter = model.config.name_or_path, getattr(model, "adapter_folder", None)
    if adapter:
        return CheckpointError(
            f"{adapter} on {folder}: {found}: the adapter or the model under it is broken; if the model alone is "
            "evaluated without fault, lower finetune.learning_rate and train again"
        )
    return CheckpointError(
        f"{folder}: {found}: the model is broken; fetch or prune it again, or leave it out of the study (a candidate: "
        "out of candidates.table or candidates.prune); where models.X.dtype is float16, try bfloat16"
    )


def _adapter_acts(model):
    return any(bool(p.detach().any()) for name, p in model.named_parameters() if "lora_B" in name)


def save(model, tokenizer, folder):
    """Write model and tokenizer to `folder`: complete files replace older ones, nothing else in it is touched."""
    folder = Path(folder)
    for torn in folder.glob(f"{disks.PARTIAL}*/"):  # one process at a time saves to a folder
        shutil.rmtree(torn)
    partial = folder / f"{disks.partial_name()}model"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    pruned_shapes.write_manifest(partial, model.config)
    for file in folder.glob("*.safetensors*"):
        file.unlink()  # shards of an earlier, larger checkpoint would be read along with the new ones
    records.move_in(partial, folder)


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer in a checkpoint folder; with the end-of-sequence token for padding where it has none of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # as above: a torn file meets code that expects a whole one
        raise CheckpointError(f"{path}: its tokenizer does not load: {_said(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(model, tokenizer, path):
    """Refuse a tokenizer that yields ids for which `model` has no embedding row (more rows than tokens is normal)."""
    rows = model.get_input_embeddings().weight.shape[0]
    top = max(tokenizer.get_vocab().values())
    if top >= rows:
        raise CheckpointError(f"{path}: its tokenizer yields ids up to {top}, its embedding has only {rows} rows")


def context_length(model):
    """The number of tokens that `model` was made for."""
    return int(model.config.max_position_embeddings)


def parameters(model):
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_parameters(folder):
    """Number of parameters in a checkpoint: of safetensors from the files' headers, of `.bin` from their tensors."""
    shapes = pruned_shapes.tensor_shapes(folder)
    if shapes is None:
        return sum(_count_in_bin(path) for path in fingerprints.weights_files(folder))
    return sum(math.prod(shape) for shape in shapes.values())


def _count_in_bin(path):
    import torch

    try:
        tensors = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        return sum(tensor.numel() for tensor in {id(t): t for t in tensors.values()}.values())
    except Exception as error:  # whatever torch, zipfile or the restricted unpickler makes of a damaged file
        raise CheckpointError(f"{path}: cannot be read as a checkpoint's tensors: {error}") from error
