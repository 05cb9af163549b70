"""Run one training, or generate answers with its result, without the workflow: `coppice finetune`, `coppice generate`.

The training engine is the workflow's. Options have the names of the keys in the configuration's section `finetune` and
are checked by its schema.
"""

import json
import os
from pathlib import Path

from coppice.core.errors import SettingsError
from coppice.study.settings import arms, lora_presets, registry, schema

DATA = "data"
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
LEFT_OUT = ("dataset", "seeds")  # the options --data and --seed replace these keys
PROMPTS = ("alpaca", "chat", "none")


def options():
    """Yield (key, schema node, place) of every option of `coppice finetune`; place is (), ("data",) or ("lora",)."""
    section = schema.schema()["properties"]["finetune"]["properties"]
    for key, node in section.items():
        if key in (DATA, "lora"):
            yield from ((name, child, (key,)) for name, child in node["properties"].items() if name not in LEFT_OUT)
        elif key not in LEFT_OUT:
            yield key, node, ()


def help_text(key, node, place):
    """Return the help text of an option: the schema's description and the default."""
    default = lora_presets.DEFAULTS[key] if place == ("lora",) and key in lora_presets.DEFAULTS else node.get("default")
    text = " ".join(node["description"].split())
    return text if default in (None, []) else f"{text} (default: {json.dumps(default)})".replace('"', "")


def settings(given, train="lora"):
    """Return the section `finetune` with the values `given` (key -> text or list of texts) and the defaults.

    Raises SettingsError for a wrong value, or for an adapter's option if all weights are trained.
    """
    section, nested = {}, {DATA: {}, "lora": {}}
    for key, _, place in options():
        if given.get(key) is not None:
            (nested[place[0]] if place else section)[key] = _single(given[key])
    node = schema.schema()["properties"]["finetune"]
    whole = schema.filled(schema.checked_part(section | nested, node, ("finetune",)), node)
    if train == arms.ALL_WEIGHTS and any(value is not None for value in whole["lora"].values()):
        raise SettingsError("--train all: options of an adapter are given; remove them, or set --train lora")
    if train == arms.ALL_WEIGHTS and whole["merge"]:
        raise SettingsError("--merge: needs an adapter, but --train is all; remove one of them")
    whole["lora"] = lora_presets.resolve(whole["lora"])
    return whole | ({"train": arms.ALL_WEIGHTS} if train == arms.ALL_WEIGHTS else {})


def _single(value):
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def finetune(model, dataset, output, given, train="lora", prompt="alpaca", seed=42, loading=None, gpus=1, threads=None):
    """Fine-tune a model without the workflow. A later call with the same `output` resumes the training.

    Args:
        model: checkpoint folder, or a hub id, which is fetched.
        dataset: a local file, the name of an official data set such as alpaca, or a hub id.
        output: folder of the result.
        given: key -> text, or list of texts, of the section `finetune`.
        train: lora or all.
        prompt: prompt format.
        seed: of the training.
        loading: {dtype, quantize, trust_remote_code, device_map}.
        gpus: number of GPUs to train on.
        threads: CPU threads; default: all available ones.

    Raises:
        CoppiceError: an argument is wrong.
        SystemExit: the training itself failed; its message is already printed.
    """
    from coppice.core import jobs

    output, section = Path(output), settings(given, train)
    source = _folder(model)
    _check_free(output, [source], checkpoint=False)
    entry = _entry(dataset)
    threads = threads or len(os.sched_getaffinity(0))
    loading = {"dtype": None, "quantize": None, "trust_remote_code": False, "device_map": None} | (loading or {})
    record = _prepared(entry, output)
    with jobs.computing(str(output / "finetune.log"), None, "finetune", threads, {"gpu": gpus}, loading):
        from coppice import models
        from coppice.stages import recover

        recover.finetune(
            identity={"model": Path(source).name, "config": output.name},
            source=models.Source(path=source, **loading),
            datasets={DATA: record},
            settings=section | {"data": section["data"] | {"dataset": DATA}},
            prompt=prompt,
            output=output,
            seed=seed,
            world=1 if loading["device_map"] else max(1, gpus),
        )


def _folder(model):
    """Return the checkpoint folder `model`, or the downloaded snapshot if it is a hub id."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(
            f"--model: there is no folder {model}, and the hub did not provide a model of that name: {error}"
        ) from error


def _check_free(output, used, checkpoint):
    """Raise SettingsError if writing to `output` would overwrite one of the `used` folders.

    checkpoint: whether to reject every folder that holds a checkpoint.
    """
    if any(output.resolve() == Path(folder).resolve() for folder in used):
        raise SettingsError(f"--output: {output} is the folder of the model or adapter itself; name another folder")
    if checkpoint and any(output.glob("*.safetensors")):
        raise SettingsError(f"--output: {output} already holds a checkpoint; name another folder")


def _entry(dataset):
    """Return the data-set entry that `data.prepare` takes, for a local file, an official data set or a hub id."""
    path = Path(dataset).expanduser()
    plain = {"columns": {}, "splits": {"train": "train"}, "uses": ["training"]}
    if path.is_file():
        form = FORMATS.get(path.suffix)
        if form is None:
            raise SettingsError(f"--data: {dataset} has an unsupported suffix; valid are {', '.join(FORMATS)}")
        return plain | {"path": str(path.resolve()), "format": form}
    if dataset in registry.DATASETS:
        return plain | {key: value for key, value in registry.completed(dataset, {}).items() if key != "splits"}
    if dataset.startswith((".", "/", "~")) or path.is_dir() or path.suffix in FORMATS:
        raise SettingsError(f"--data: there is no file {dataset}; name a file with a suffix of {', '.join(FORMATS)}")
    return plain | {"path": dataset}


def _prepared(entry, output):
    """Prepare the data and return the path of dataset.json.

    The data are read again on every call, so that a resumed training notices if they changed.
    """
    from coppice import data

    folder = output / ".data"
    data.prepare(DATA, entry, folder, needs_selection=False)
    return str(folder / "dataset.json")


def generate(model, adapter, questions, merge=False, prompt="alpaca", new_tokens=128, output=None, loading=None):
    """Return a model's answers to questions: [{prompt, text}]; text is None if a prompt fills the model's context.

    Args:
        model: checkpoint folder or hub id.
        adapter: folder of the adapter, or None.
        questions: list of texts.
        merge: whether to merge the adapter into the weights first.
        prompt: prompt format.
        new_tokens: largest number of tokens of an answer.
        output: folder to write the merged checkpoint to, or None.
        loading: as for `finetune`.
    """
    from coppice.core import gpus, logs

    if output and not (merge and adapter):
        raise SettingsError("--output: is the folder of the merged checkpoint; give --adapter and --merge too")
    source = _folder(model)
    if output:
        _check_free(Path(output), filter(None, [source, adapter]), checkpoint=True)
    logs.start_logging()
    with gpus.lease(1):
        from transformers.utils import logging as bars

        from coppice import models
        from coppice.stages.evaluate import generation

        bars.disable_progress_bar()

        place = models.Source(path=source, **(loading or {}))
        loaded = models.load(place, adapter)
        tokenizer = models.load_tokenizer(source, place.trust_remote_code)
        if merge and adapter:
            loaded = loaded.merge_and_unload()
        if output:
            models.save(loaded, tokenizer, Path(output))
        return generation.answers(loaded, tokenizer, questions, prompt, new_tokens)
