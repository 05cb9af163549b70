"""One training, or a try of what came of it, without the workflow: `coppice finetune` and `coppice generate`.

The engine is the workflow's; options are named as keys of the section `finetune` of the configuration, and checked by
its schema.
"""

import json
import os
from pathlib import Path

from coppice.core.errors import SettingsError
from coppice.study.settings import arms, lora_presets, registry, schema

DATA = "data"
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
LEFT_OUT = ("dataset", "seeds")  # the data set has an option of its own, a seed too
PROMPTS = ("alpaca", "chat", "none")


def options():
    """(key, schema node, where it stands: (), ("data",) or ("lora",)) of every option of `coppice finetune`."""
    section = schema.schema()["properties"]["finetune"]["properties"]
    for key, node in section.items():
        if key in (DATA, "lora"):
            yield from ((name, child, (key,)) for name, child in node["properties"].items() if name not in LEFT_OUT)
        elif key not in LEFT_OUT:
            yield key, node, ()


def help_text(key, node, place):
    """What the help says of an option: the schema's description, and what holds where it is not given."""
    default = lora_presets.DEFAULTS[key] if place == ("lora",) and key in lora_presets.DEFAULTS else node.get("default")
    text = " ".join(node["description"].split())
    return text if default in (None, []) else f"{text} (default: {json.dumps(default)})".replace('"', "")


def settings(given, train="lora"):
    """The section `finetune` for the values `given` (key -> text, or list of texts), its defaults filled in."""
    section, nested = {}, {DATA: {}, "lora": {}}
    for key, _, place in options():
        if given.get(key) is not None:
            (nested[place[0]] if place else section)[key] = _single(given[key])
    node = schema.schema()["properties"]["finetune"]
    whole = schema.filled(schema.checked_part(section | nested, node, ("finetune",)), node)
    if train == arms.ALL_WEIGHTS and any(value is not None for value in whole["lora"].values()):
        raise SettingsError("--train all: an adapter's options go with --train lora")
    if train == arms.ALL_WEIGHTS and whole["merge"]:
        raise SettingsError("--merge: is about an adapter, but --train is all")
    whole["lora"] = lora_presets.resolve(whole["lora"])
    return whole | ({"train": arms.ALL_WEIGHTS} if train == arms.ALL_WEIGHTS else {})


def _single(value):
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def finetune(model, dataset, output, given, train="lora", prompt="alpaca", seed=42, loading=None, gpus=1, threads=None):
    """Fine-tune `model` (a folder, or a hub id that is fetched) on `dataset` (a file, a folder's name, a hub id or a
    data set that Coppice knows) into the folder `output`, which a later call goes on with.

    given: key -> value of the section `finetune`; loading: {dtype, quantize, trust_remote_code, device_map}. Raises
    CoppiceError, SystemExit after one that the training itself met.
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
    """The checkpoint folder `model`, or the snapshot of a hub id."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(f"--model: there is no folder {model}, and the hub gives no such model: {error}") from error


def _check_free(output, used, checkpoint):
    """Refuse to write where a model or an adapter lies that is read, or (`checkpoint`) any other one."""
    if any(output.resolve() == Path(folder).resolve() for folder in used):
        raise SettingsError(f"--output: {output} is the folder of the model or adapter itself; name another one")
    if checkpoint and any(output.glob("*.safetensors")):
        raise SettingsError(f"--output: {output} holds a checkpoint already; name another folder")


def _entry(dataset):
    """What `data.prepare` reads: a local file by its suffix, a known data set by its name, else a hub id."""
    path = Path(dataset).expanduser()
    plain = {"columns": {}, "splits": {"train": "train"}, "uses": ["training"]}
    if path.is_file():
        form = FORMATS.get(path.suffix)
        if form is None:
            raise SettingsError(f"--data: {dataset} is none of {', '.join(FORMATS)}")
        return plain | {"path": str(path.resolve()), "format": form}
    if dataset in registry.DATASETS:
        return plain | {key: value for key, value in registry.with_known(dataset, {}).items() if key != "splits"}
    if dataset.startswith((".", "/", "~")) or path.is_dir() or path.suffix in FORMATS:
        raise SettingsError(f"--data: there is no file {dataset}; name one that ends in {', '.join(FORMATS)}")
    return plain | {"path": dataset}


def _prepared(entry, output):
    """The dataset.json of the data, read anew each time: the training notices where it changed."""
    from coppice import data

    folder = output / ".data"
    data.prepare(DATA, entry, folder, needs_selection=False)
    return str(folder / "dataset.json")


def generate(model, adapter, questions, merge=False, prompt="alpaca", new_tokens=128, output=None, loading=None):
    """Answers of `model` with `adapter` (a folder, or None) to questions: [{prompt, text}].

    merge: put the adapter into the weights first; output: a folder to write the merged checkpoint to.
    """
    from coppice.core import gpus, logs

    if output and not (merge and adapter):
        raise SettingsError("--output: is where the merged checkpoint goes; give --adapter and --merge with it")
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
