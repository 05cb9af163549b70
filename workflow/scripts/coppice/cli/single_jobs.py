"""Run one training, or generate answers with its result, without the workflow: `coppice finetune`, `coppice generate`.

The training engine is the workflow's. Options have the names of the keys in the configuration's section `finetune` and
are checked like them.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import SettingsError
from coppice.study import chat_date
from coppice.study.settings import arms, checking, keys, lora_presets, registry
from coppice.study.settings.sections.finetune import Finetune

DATA, VALIDATION = "data", "validation"  # names of the data sets
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
LEFT_OUT = ("dataset", "seeds")  # the options --data and --seed replace these keys
PROMPTS = ("alpaca", "chat", "none")
Given = str | list[str]  # the value of an option on the command line


def options() -> Iterator[keys.Key]:
    """Yield the key of every option of `coppice finetune`: of the section, of `data`, `lora` and `objective`."""
    for key in keys.every_key(Finetune):
        if key.path[-1] not in LEFT_OUT and "<name>" not in key.path and not key.form.section:
            yield key


def help_text(key: keys.Key) -> str:
    """Return the help text of an option: the key's description and the default."""
    if key.path == ("objective", "teacher"):  # the command knows no other models of a study
        return "With --kl: the model to learn from, a checkpoint folder or hub id with the same tokenizer."
    default = lora_presets.DEFAULTS.get(key.path[-1]) if key.path[0] == "lora" else key.default
    text = key.description
    return text if default in (None, [], {}) else f"{text} (default: {json.dumps(default)})".replace('"', "")


def settings(given: Mapping[str, Given | None], train: str = "lora") -> Record:
    """Return the section `finetune` with the values `given` (key -> text or list of texts) and the defaults.

    Raises SettingsError for a wrong value, or for an adapter's option if all weights are trained.
    """
    section, nested = {}, {DATA: {}, "lora": {}, "objective": {}}
    for key in options():
        *place, name = key.path
        if given.get(name) is not None:
            (nested[place[0]] if place else section)[name] = _value(key, given[name])
    checked = checking.checked(Finetune, section | nested, ("finetune",))
    if idle := checked.objective.idle():
        raise SettingsError(f"--{idle[0]}: has no effect without --kl; give --kl, or remove it")
    if checked.objective.kl and checked.objective.teacher is None:
        raise SettingsError("--kl: needs a model to learn from; give --teacher")
    whole = checked.model_dump()
    if train == arms.ALL_WEIGHTS and any(value is not None for value in whole["lora"].values()):
        raise SettingsError("--train all: options of an adapter are given; remove them, or set --train lora")
    if train == arms.ALL_WEIGHTS and whole["merge"]:
        raise SettingsError("--merge: needs an adapter, but --train is all; remove one of them")
    whole["lora"] = lora_presets.resolve(whole["lora"])
    return whole | ({"train": arms.ALL_WEIGHTS} if train == arms.ALL_WEIGHTS else {})


def _value(key: keys.Key, given: Given) -> object:
    """Return an option's value: texts at commas and in arguments of their own are a list, YAML is a mapping."""
    if "list" in key.form.kinds:
        texts = [part for text in ([given] if isinstance(given, str) else given) for part in text.split(",") if part]
        return texts[0] if len(texts) == 1 and "text" in key.form.kinds else texts
    return _mapping(key.path[-1], given) if "mapping" in key.form.kinds else given


def _mapping(name: str, text: str) -> Record:
    import yaml

    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"--{name}: '{text}' is not valid YAML ({error}); write '{{key: value}}'") from error
    if not isinstance(found, dict):
        raise SettingsError(f"--{name}: found '{text}', but a mapping is needed; write '{{key: value}}'")
    return found


@dataclass(frozen=True)
class Training:
    """One training without the workflow.

    Attributes:
        model: checkpoint folder, or a hub id, which is fetched.
        dataset: a local file, the name of an official data set such as alpaca, or a hub id.
        output: folder of the result.
        given: key -> text, or list of texts, of the section `finetune`; None for a key that is not given.
        train: lora or all.
        prompt: prompt format; None for the usual one of the kind of model.
        seed: of the training.
        loading: {dtype, quantize, trust_remote_code, device_map, context_length, eos_token}.
        gpus: number of GPUs to train on.
        threads: CPU threads; None for all available ones.
        chat_date: the day that a chat template reads; None for the day on which the training began.
        image_root: folder of the pictures that the rows name; None for that of the data file.
    """

    model: str
    dataset: str
    output: str
    given: Mapping[str, Given | None]
    train: str = "lora"
    prompt: str | None = None
    seed: int = 42
    loading: Record = field(default_factory=dict)
    gpus: int = 1
    threads: int | None = None
    chat_date: str | None = None
    image_root: str | None = None


def finetune(job: Training) -> None:
    """Fine-tune a model without the workflow. A later call with the same `output` resumes the training.

    Raises:
        CoppiceError: an argument is wrong.
        SystemExit: the training itself failed; its message is already printed.
    """
    from coppice.core import jobs

    output, section = Path(job.output), settings(job.given, job.train)
    source = _folder(job.model)
    teacher = section.get("objective", {}).get("teacher")
    teacher = teacher and _folder(teacher, "--teacher")
    _check_free(output, filter(None, [source, teacher]), checkpoint=False)
    entries = {DATA: _entry("--data", job.dataset)}
    if section["data"]["validation"]:
        entries[VALIDATION] = _entry("--validation", section["data"]["validation"])
    threads = job.threads or len(os.sched_getaffinity(0))
    loading = {"dtype": None, "quantize": None, "trust_remote_code": False, "device_map": None} | job.loading
    folder = output / ".data"
    datasets = {name: _prepared(name, entry, folder, job.image_root) for name, entry in entries.items()}
    day = chat_date.of(job.chat_date, folder)
    chat_date.keep(day, folder)
    named = {"dataset": DATA, "validation": VALIDATION if VALIDATION in datasets else None}
    with jobs.computing(str(output / "finetune.log"), None, "finetune", threads, {"gpu": job.gpus}):
        from coppice import models
        from coppice.stages import recover

        request = recover.TrainingRequest(
            identity={"model": Path(source).name, "config": output.name},
            source=models.Source(path=source, chat_date=day, **loading),
            datasets=datasets,
            settings=recover.TrainingSettings.model_validate(section | {"data": section["data"] | named}),
            prompt=_prompt(source, job.prompt, "--prompt"),
            output=output,
            seed=job.seed,
            teacher=models.Source(path=teacher, chat_date=day, **loading) if teacher else None,
            world=1 if loading["device_map"] else max(1, job.gpus),
        )
        recover.finetune(request)


def _folder(model: str, option: str = "--model") -> str:
    """Return the checkpoint folder `model`, or the downloaded snapshot if it is a hub id. option: that named it."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(
            f"{option}: there is no folder {model}, and the hub did not provide a model of that name: {error}"
        ) from error


def _prompt(source: str, given: str | None, option: str) -> str:
    """Return the prompt format of a model: the given one, else the first that its kind takes."""
    from coppice.models import kinds

    kind = kinds.of_checkpoint(source)
    if given and given not in kind.prompts:
        raise SettingsError(f"{option}: is {given}, but {kind.noun} takes {' or '.join(kind.prompts)}")
    return given or kind.prompts[0]


def _check_free(output: Path, used: Iterable[PathLike], checkpoint: bool) -> None:
    """Raise SettingsError if writing to `output` would overwrite one of the `used` folders.

    checkpoint: whether to reject every folder that holds a checkpoint.
    """
    if any(output.resolve() == Path(folder).resolve() for folder in used):
        raise SettingsError(f"--output: {output} is the folder of the model or adapter itself; name another folder")
    if checkpoint and any(output.glob("*.safetensors")):
        raise SettingsError(f"--output: {output} already holds a checkpoint; name another folder")


def _entry(option: str, dataset: str) -> Record:
    """Return the data-set entry that `data.prepare` takes, for a local file, an official data set or a hub id."""
    path = Path(dataset).expanduser()
    plain = {"columns": {}, "splits": {"train": "train"}, "uses": ["training"]}
    if path.is_file():
        form = FORMATS.get(path.suffix)
        if form is None:
            raise SettingsError(f"{option}: {dataset} has an unsupported suffix; valid are {', '.join(FORMATS)}")
        return plain | {"path": str(path.resolve()), "format": form}
    if dataset in registry.DATASETS:
        return plain | {key: value for key, value in registry.completed(dataset, {}).items() if key != "splits"}
    if dataset.startswith((".", "/", "~")) or path.is_dir() or path.suffix in FORMATS:
        raise SettingsError(f"{option}: there is no file {dataset}; name a file with a suffix of {', '.join(FORMATS)}")
    return plain | {"path": dataset}


def _prepared(name: str, entry: Record, folder: Path, image_root: str | None) -> str:
    """Prepare a data set below `folder` and return the path of its dataset.json.

    The data are read again on every call, so that a resumed training notices if they changed.
    """
    from coppice import data

    pictures = {"image_root": image_root} if image_root else {}
    data.prepare(name, entry | pictures, folder / name, needs_selection=False)
    return str(folder / name / "dataset.json")


@dataclass(frozen=True)
class Questions:
    """Questions to a model.

    Attributes:
        model: checkpoint folder or hub id.
        adapter: folder of the adapter, or None.
        questions: their texts.
        merge: whether to merge the adapter into the weights first.
        prompt: prompt format; None for the usual one of the kind of model.
        new_tokens: largest number of tokens of an answer.
        output: folder to write the merged checkpoint to, or None.
        loading: as for `Training`.
        keep_sparsity: mask or off: whether the zeros of pruned weights stay zero when the adapter is merged.
        images: files of the pictures that all questions are about.
    """

    model: str
    adapter: str | None
    questions: Sequence[str]
    merge: bool = False
    prompt: str | None = None
    new_tokens: int = 128
    output: str | None = None
    loading: Record = field(default_factory=dict)
    keep_sparsity: str = "mask"
    images: Sequence[str] = ()


def _trained_on(adapter: str | None) -> str | None:
    """Return the day that the chat template read while an adapter was trained, or None."""
    record = Path(adapter or "") / "finetuning_config.json"
    return records.read(record).get("chat_date") if adapter and record.is_file() else None


def generate(asked: Questions) -> list[Record]:
    """Return a model's answers to questions: [{prompt, text}]; text is None if a prompt fills the model's context."""
    from coppice.core import gpus, logs

    merges = bool(asked.merge and asked.adapter)
    output = Path(asked.output) if asked.output else None
    if output and not merges:
        raise SettingsError("--output: is the folder of the merged checkpoint; give --adapter and --merge too")
    source = _folder(asked.model)
    form = _prompt(source, asked.prompt, "--form")
    if output:
        _check_free(output, filter(None, [source, asked.adapter]), checkpoint=True)
    logs.start_logging()
    with gpus.lease(1):
        from transformers.utils import logging as bars

        from coppice import models
        from coppice.models import sparsity
        from coppice.stages.evaluate import generation

        bars.disable_progress_bar()

        place = models.Source(path=source, chat_date=_trained_on(asked.adapter), **asked.loading)
        kind = models.kind_of(place)
        if not {"generation", "answers"} & set(kind.evaluators):
            raise SettingsError(
                f"--model: {source} is {kind.noun}, which writes no text. For a merged checkpoint, train with "
                "coppice finetune --merge."
            )
        loaded = models.load(place, asked.adapter)
        reader = place.reader()
        if merges:
            before = sparsity.measure(loaded)
            loaded = sparsity.merge(loaded, keep_zeros=asked.keep_sparsity == "mask")
        if output:
            sparsity.check_name(output, before, sparsity.measure(loaded))
            models.save(loaded, reader, output)
        if asked.images or "generation" not in kind.evaluators:
            return generation.answers_of_kind(
                loaded, reader, asked.questions, form, asked.new_tokens, files=asked.images
            )
        return generation.answers(loaded, reader.tokenizer, asked.questions, form, asked.new_tokens)
