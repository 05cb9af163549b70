"""Load and save models of every kind: checkpoint folders, with or without an adapter.

transformers re-initializes tensors that a checkpoint lacks, and only logs it. Here a missing, unexpected or misshapen
tensor raises an error that lists the tensors. Models are loaded only from folders: only the fetch rules use the hub.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core import disks, fingerprints, gpus, records
from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError, SettingsError

from . import adapters, chat_clock, files, kinds, library_compat, pruned_shapes, readers
from .library_errors import described
from .readers import Reader
from .tokenizing import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .kinds import LoadedModel
    from .pruned_shapes import Widths

logger = logging.getLogger("coppice.models")

SHOWN = 8  # tensors that an error names
NO_LENGTH = (
    "{}: its config.json does not say how many tokens the model takes. Set models.X.context_length to the length of "
    "the texts that it was trained on, which its model card states."
)


@dataclass(frozen=True)
class Source:
    """The folder of a model, and how to load the model from it."""

    path: str
    dtype: str | None = None
    quantize: str | None = None
    trust_remote_code: bool = False
    device_map: str | None = None
    context_length: int | None = None
    eos_token: str | None = None
    chat_date: str | None = None  # the day that a chat template reads, YYYY-MM-DD; None leaves it the clock

    def given(self) -> dict[str, Any]:
        """Return what the user says about the model in place of its files: {context_length, eos_token}, if set."""
        named = {"context_length": self.context_length, "eos_token": self.eos_token}
        return {key: value for key, value in named.items() if value is not None}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the model. Its chat templates read the day `chat_date`."""
        return chat_clock.fix(load_tokenizer(self.path, self.trust_remote_code, self.eos_token), self.chat_date)

    def reader(self) -> Reader:
        """Load the tokenizer of the model, and its image processor if it sees."""
        tokenizer = self.tokenizer()
        return readers.seeing(self.path, tokenizer) if kind_of(self).sees else Reader(tokenizer)

    @classmethod
    def of_record(cls, record: PathLike, loading: Mapping[str, Any]) -> Source:
        """Return the source that a `model.json` record points to, with the `loading` options of the configuration.

        Raises:
            CheckpointError: if the weights are not those that were fetched or registered.
        """
        folder, recorded = folder_of(record), records.read(record)["weights_fingerprint"]
        if fingerprints.weights(folder) != recorded:
            raise CheckpointError(
                f"{folder}: its weights or its config.json changed after {record} was written (the fingerprint "
                "differs). Put them back; or delete that record and run snakemake again to use the changed model."
            )
        return cls(path=folder, **loading)


def folder_of(record: PathLike) -> str:
    """Return the checkpoint folder that a `model.json` points to."""
    path = Path(records.read(record)["path"])
    # look beside the record first, so that the folder is found from any working folder
    beside = Path(record).parent / path.name
    return str(path if path.is_absolute() or not beside.is_dir() else beside)


def device() -> torch.device:
    """Return the torch device of this process: the first visible GPU, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_kind() -> str:
    """Return "cuda" or "cpu", which `device` will use, without importing torch (seconds)."""
    build = importlib.metadata.version("torch")
    return "cuda" if "+cpu" not in build and gpus.count() else "cpu"


def device_memory() -> int:
    """Return the bytes of memory of `device`: of the first visible GPU, else of the machine."""
    import os

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def dtype_of(name: str | None) -> torch.dtype:
    """Return the torch dtype called `name`; for None, bfloat16 on a GPU that supports it and float32 elsewhere."""
    import torch

    if name is not None:
        return getattr(torch, name)
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load(
    source: Source, adapter: PathLike | None = None, train: bool = False, on: torch.device | str | None = None
) -> LoadedModel:
    """Load the model of `source`, with `adapter` on it if one is given.

    Args:
        source: folder and loading options.
        adapter: folder of a LoRA adapter, or None.
        train: return the model in training mode, and the adapter with gradients.
        on: torch device; by default this process's.

    Raises:
        CheckpointError: if the folder does not hold exactly the tensors of the model, or if the adapter does not fit.
    """
    from transformers import AutoConfig

    path, noun = Path(source.path), "a model"
    files.check(path)
    if adapter is not None:
        adapters.check_origin(adapter, path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=source.trust_remote_code, local_files_only=True)
        kind = kinds.of(config)
        noun, odd = kind.noun, pruned_shapes.layers_of(path, config)
        model: LoadedModel = _load_odd(source, config, odd, on) if odd else _load_regular(source, kind, on)
    except CheckpointError:
        raise
    except Exception as error:  # with unusual configuration values, transformers raises any kind of error
        raise CheckpointError(f"{path}: does not load as {noun}: {described(error)}") from error
    if source.context_length is not None:
        model.given_context_length = source.context_length
    if adapter is not None:
        model = adapters.load_adapter(model, adapter, train)
    return model.train(train)


def kind_of(source: Source) -> kinds.ModelKind:
    """Return the kind of the model of `source`, from its config.json alone."""
    files.check(source.path)
    return kinds.of_checkpoint(source.path)


def skeleton(source: Source) -> PreTrainedModel:
    """Return the model of `source` on torch's meta device: its shapes, without memory for weights."""
    import torch
    from transformers import AutoConfig

    files.check(source.path)
    remote = source.trust_remote_code
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=remote, local_files_only=True)
    with torch.device("meta"):
        model = kinds.of(config).auto_class().from_config(config, trust_remote_code=remote)
    odd = pruned_shapes.layers_of(source.path, config)
    if odd:
        from .pruned_shapes import building, stack_building

        if config.model_type in pruned_shapes.STACKS:
            stack_building.shape(model, odd)
        else:
            building.shape(model, odd, pruned_shapes.tensor_shapes(source.path))
    return model


def _load_regular(source: Source, kind: kinds.ModelKind, on: torch.device | str | None) -> PreTrainedModel:
    """Load with transformers alone, and reject what it would only log."""
    options: dict[str, Any] = {"device_map": source.device_map} if source.device_map else {}
    if source.quantize:
        options["quantization_config"] = _quantization(source.quantize, dtype_of(source.dtype))
    model, info = kind.auto_class().from_pretrained(
        source.path,
        dtype=dtype_of(source.dtype),
        trust_remote_code=source.trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to get a list of these tensors, which `_check_complete` rejects
        **options,
    )
    _check_complete(source.path, model, info)
    library_compat.keep_4_bit_layers_unpacked(model)
    return model if options else model.to(on or device())


def _load_odd(
    source: Source, config: PretrainedConfig, odd: Mapping[int, Widths], on: torch.device | str | None
) -> PreTrainedModel:
    """Load a model whose layers differ in width."""
    from .pruned_shapes import building, stack_building

    if source.quantize:
        raise CheckpointError(
            f"{source.path}: its layers differ in width, so it cannot be quantized. Set models.X.quantize to null."
        )
    build = stack_building if config.model_type in pruned_shapes.STACKS else building
    model = build.load(source.path, config, odd, dtype_of(source.dtype))
    if not source.device_map:
        return model.to(on or device())
    from accelerate import dispatch_model, infer_auto_device_map

    blocks = library_compat.whole_modules(model)
    return dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=blocks))


def _quantization(kind: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def _check_complete(path: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())  # files hold only one of two tied tensors
    wrong = {
        "missing": [key for key in sorted(info["missing_keys"]) if key not in tied],
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    for what, keys in wrong.items():
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise CheckpointError(
                f"{path}: config.json and the weights do not match: tensors {what}: {', '.join(keys[:SHOWN])}{more}. "
                "Use the config.json that belongs to these weights."
            )


def broken(model: LoadedModel, found: str) -> CheckpointError:
    """Return the CheckpointError for a loaded model that gives no valid numbers; `found` says which."""
    folder, adapter = model.config.name_or_path, getattr(model, "adapter_folder", None)
    if adapter:
        return CheckpointError(
            f"{adapter} on {folder}: {found}. Evaluate the model without the adapter. If that succeeds, lower "
            "finetune.learning_rate and train again; if not, the model itself is broken."
        )
    return CheckpointError(
        f"{folder}: {found}. Fetch or prune the model again, or leave it out of the study (a candidate: out of "
        "candidates.table or candidates.prune). If models.X.dtype is float16, try bfloat16."
    )


def save(model: PreTrainedModel, reader: Reader, folder: PathLike) -> None:
    """Write a model and its reader to `folder`: complete files replace older ones; other files in it stay."""
    folder = Path(folder)
    for torn in folder.glob(f"{disks.PARTIAL}*/"):  # leftovers: only one process at a time saves to a folder
        shutil.rmtree(torn)
    partial = folder / f"{disks.partial_name()}model"
    model.save_pretrained(partial)
    reader.save(partial)
    pruned_shapes.write_manifest(partial, model.config)
    for file in folder.glob("*.safetensors*"):
        file.unlink()  # shards of a larger earlier checkpoint would be read together with the new ones
    records.move_in(partial, folder)


def context_length(model: LoadedModel) -> int:
    """Return the most tokens that `model` takes: as the user says, else as its configuration says.

    Raises:
        SettingsError: neither says it.
    """
    found = known_context_length(model)
    if found is None:
        raise SettingsError(NO_LENGTH.format(model.config.name_or_path or model.config.model_type))
    return found


def known_context_length(model: LoadedModel) -> int | None:
    """Return the same as `context_length`, or None if it is not known."""
    given = getattr(model, "given_context_length", None)
    return given or kinds.of(model.config).context_length(model.config)
