"""Resolve the sources of models and data sets (the hub, a local folder, the miniatures); check names and paths."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from coppice.core.aliases import Record
from coppice.core.errors import SettingsError, nearest
from coppice.core.json_text import parsed
from coppice.models import kinds

from .. import layout, local_files
from . import registry
from .resolved import Source, StudyDataset, StudyModel
from .sections.data_sets import Dataset, Splits
from .sections.finetune import TrainingData
from .sections.models import Model

LONGEST_NAME = 100  # a file name may contain two names and a few words, and file systems allow 255 bytes
RESERVED = ("figures", "grid.json", "released.json", "SUMMARY.md", "config.json", "model.json", "dataset.json")
FOLDERS_OF_RUNS = ("seed-", "checkpoint-", "superseded-", "rung-", "winner-")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LETTERS = re.compile(r"[^\W\d_]+|.+")  # the first word of a name, or, without letters, the whole name
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zst", ".bz2", ".xz")


def check_name(name: str, where: str) -> None:
    """Raise SettingsError unless `name` can be part of a path: letters, digits and . _ + - only."""
    if not NAME.fullmatch(name) or ".." in name:
        raise SettingsError(
            f"{where}: the name {name!r} cannot be part of a path; use letters, digits and . _ + - only, "
            "begin with a letter or digit, and leave out '..'"
        )
    if len(name) > LONGEST_NAME:
        raise SettingsError(
            f"{where}: the name '{name[:40]}...' has {len(name)} characters, more than {LONGEST_NAME}; shorten it"
        )
    if name in RESERVED:
        raise SettingsError(
            f"{where}: the name '{name}' is reserved for a file or folder of Coppice's own; choose another name"
        )
    if name.startswith(FOLDERS_OF_RUNS) or name.endswith(layout.TUNED):
        raise SettingsError(
            f"{where}: the name '{name}' is reserved (names of the form "
            f"{', '.join(f'{start}...' for start in FOLDERS_OF_RUNS)} and ...{layout.TUNED} are folders of Coppice's "
            "own); choose another name"
        )


def check_paths(paths: Iterable[str], where: str) -> None:
    """Raise SettingsError if a rule cannot name one of the `paths`: Snakemake has no way to escape a brace."""
    for path in paths:
        if any(mark in path for mark in "{}\n\t"):
            raise SettingsError(
                f"{where}: found '{path}'; Snakemake cannot use paths with braces, tabs or line breaks; rename it"
            )


def folder(text: str, key: str, workdir: str) -> str:
    """Return an output folder of the study as the rules name it: ~ expanded, without redundant dots and slashes.

    Raises SettingsError if it cannot be a folder.
    """
    check_paths([text], f"config key {key}")
    path = os.path.normpath(os.path.expanduser(text))
    if path.startswith("~"):
        raise SettingsError(f"config key {key}: found '{text}', but there is no such user; correct the name after ~")
    if any(len(os.fsencode(part)) > 255 for part in path.split(os.sep)) or len(absolute(path, workdir)) > 3000:
        raise SettingsError(f"config key {key}: '{text[:40]}...' is longer than file systems allow; shorten it")
    parents = [Path(absolute(path, workdir)), *Path(absolute(path, workdir)).parents]
    taken = next((parent for parent in parents if parent.exists() and not parent.is_dir()), None)
    if taken is not None:
        raise SettingsError(f"config key {key}: '{text}' cannot be a folder because {taken} is a file; name another")
    return path


def absolute(path: str, workdir: str) -> str:
    """Return `path` as an absolute path: ~ expanded, relative paths resolved against `workdir`."""
    return os.path.abspath(os.path.join(workdir, os.path.expanduser(path)))


def locate(text: str, key: str, workdir: str, miniatures: Sequence[str], notices: list[str]) -> Source:
    """Return {kind: hub|local|miniature, path} of a model's base or a data set's path.

    Args:
        text: the configured value.
        key: its configuration key, for messages.
        workdir: the folder that relative paths resolve against.
        miniatures: the valid names after `miniature/`.
        notices: a list to which a notice is added if a folder has the name of the hub id.

    Raises:
        SettingsError: the text has none of the three forms.
    """
    if text.startswith("miniature/"):
        name = text.removeprefix("miniature/")
        if name not in miniatures:
            raise SettingsError(
                f"config key {key}: there is no miniature '{name}'; valid are "
                f"{', '.join('miniature/' + m for m in miniatures)}{nearest(name, miniatures)}"
            )
        return Source(kind="miniature", path=name)
    if text in (".", "..") or text.startswith(("/", "./", "../", "~")):
        return Source(kind="local", path=absolute(text, workdir))
    if not HUB_ID.fullmatch(text) or ".." in text:
        raise SettingsError(
            f"config key {key}: '{text}' is neither a hub id (org/name), nor a local path (which begins with /, ./, "
            f"../ or ~/), nor a miniature (miniature/{miniatures[0]}, ...)"
        )
    if os.path.exists(os.path.join(workdir, text)):
        notices.append(f"config key {key}: '{text}' is read as a hub id; to use the local folder, write './{text}'")
    return Source(kind="hub", path=text)


def resolve_model(name: str, entry: Model, workdir: str, notices: list[str]) -> StudyModel:
    """Return the model's settings with source, kind, family and prompt filled in.

    A model from the hub whose kind is not given is taken for a causal language model until it is fetched.

    Raises:
        SettingsError: settings conflict.
    """
    key = f"models.{name}"
    source = locate(entry.base, f"{key}.base", workdir, list(registry.MINIATURE_MODELS), notices)
    model_type, kind = None, entry.kind or "causal-lm"
    if source.kind == "miniature":
        miniature = registry.MINIATURE_MODELS[source.path]
        family, kind = miniature.family, miniature.kind
        _check_miniature(key, entry, miniature)
    elif source.kind == "local":
        content = _local_config(source.path, entry.base, f"{key}.base")
        model_type = content.get("model_type")
        kind = _local_kind(content, key, entry)
        family = _family_of(model_type or "") or model_type
        check_paths(layout.local_files(source), f"config key {key}.base")
    else:
        # the config.json of a hub model is fetched later, and the family must not change with that
        family = _family_of(source.path) or LETTERS.search(source.path.rpartition("/")[2])[0].lower()
    prompt = _prompt(key, entry, kinds.named(kind))
    resolved = {"source": source, "kind": kind, "prompt": prompt, "family": entry.family or family}
    own = dict.fromkeys(("prune", "calibration", "finetune", "evaluate"))
    return StudyModel.model_validate(dict(entry) | own | resolved | {"model_type": model_type})


def _prompt(key: str, entry: Model, kind: kinds.ModelKind) -> str:
    """Return a model's prompt format: as given, else the usual one. Raises SettingsError if its kind has none such."""
    if entry.prompt and entry.prompt not in kind.prompts:
        raise SettingsError(
            f"config key {key}.prompt: found '{entry.prompt}', but {kind.noun} takes {', '.join(kind.prompts)}"
        )
    usual = {"base": "alpaca", "instruct": "chat"}[entry.variant]
    return entry.prompt or (usual if {"alpaca", "chat"} <= set(kind.prompts) else kind.prompts[0])


def _local_kind(content: Record, key: str, entry: Model) -> str:
    """Return the kind of a local model, which its config.json decides. Raises SettingsError if another one is given."""
    kind = kinds.of(SimpleNamespace(**content))
    if entry.kind not in (None, kind.name):
        raise SettingsError(
            f"config key {key}.kind: found '{entry.kind}', but the config.json in {entry.base} is that of {kind.noun}; "
            f"set it to {kind.name}, or leave it out"
        )
    return kind.name


def _check_miniature(key: str, entry: Model, miniature: registry.Miniature) -> None:
    for setting, value in miniature._asdict().items():
        given = getattr(entry, setting)
        if given not in (None, value):
            raise SettingsError(
                f"config key {key}.{setting}: found '{given}', but {entry.base} is '{value}'; correct one of them"
            )


def _family_of(text: str) -> str | None:
    return next((family for family in registry.FAMILIES if family in text.lower()), None)


def kind_at(checkpoint: str, key: str, workdir: str) -> kinds.ModelKind | None:
    """Return the kind of a checkpoint folder, or None if there is none.

    Args:
        checkpoint: the folder as the user gave it.
        key: the section with the configuration key `checkpoint`, for messages.
        workdir: the folder that relative paths resolve against.
    """
    folder = absolute(checkpoint, workdir)
    if not os.path.isfile(Path(folder, "config.json")):  # not is_file, which raises OSError if a text is no path
        return None
    return kinds.of(SimpleNamespace(**_local_config(folder, checkpoint, f"{key}.checkpoint")))


def _local_config(folder: str, base: str, key: str) -> Record:
    """Return the content of the checkpoint's config.json. Raises SettingsError if `folder` is not a checkpoint.

    Args:
        folder: an absolute path.
        base: the folder as the user gave it.
        key: the configuration key, for messages.
    """
    file = Path(folder, "config.json")
    if not os.path.isdir(folder):
        raise SettingsError(f"config key {key}: there is no folder {base} (looked at {folder})")
    if not os.path.isfile(file):
        raise SettingsError(
            f"config key {key}: the folder {base} is not a checkpoint, because it has no config.json ({folder})"
        )
    try:
        content = parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"config key {key}: {file} is not valid JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type", ""), str):
        raise SettingsError(
            f"config key {key}: {file} is not a model's configuration, which is a mapping with a model_type"
        )
    return content


def resolve_dataset(name: str, entry: Dataset, data_root: str | None, workdir: str, notices: list[str]) -> StudyDataset:
    """Return the data set's settings with source and absolute local paths. Raises SettingsError if it is missing."""
    key = f"datasets.{name}"
    if entry.path is None:
        raise SettingsError(f"config key {key}.path is missing; set it to the hub id, file or folder of '{name}'")
    text = _under_data_root(entry.path, f"{key}.path", data_root, workdir)
    if entry.format:
        source = Source(kind="local", path=absolute(text, workdir))
    else:
        source = locate(text, f"{key}.path", workdir, registry.MINIATURE_DATASETS, notices)
    splits = entry.splits.model_dump()
    if entry.image_root is not None:
        root = absolute(_under_data_root(entry.image_root, f"{key}.image_root", data_root, workdir), workdir)
        if not os.path.isdir(root):
            raise SettingsError(
                f"config key {key}.image_root: there is no folder {entry.image_root} (looked at {root})"
            )
        entry = entry.model_copy(update={"image_root": root})
    if source.kind != "local":
        if source.kind == "miniature":
            _check_roles(key, splits)
        return StudyDataset.model_validate(dict(entry) | {"source": source})
    if not os.path.exists(source.path):
        raise SettingsError(f"config key {key}.path: there is no {text} (looked at {source.path})")
    check_paths([source.path, *layout.local_files(source, splits.values())], f"config key {key}.path")
    return StudyDataset.model_validate(dict(entry) | {"path": source.path, "source": source})


def with_roles(name: str, entry: StudyDataset, needed: Mapping[str, str]) -> StudyDataset:
    """Return the resolved data set with a split, or None, for each role.

    A single file gets exactly one role: the one that the study needs.

    Args:
        name: of the data set.
        entry: its resolved settings.
        needed: role -> configuration key that needs it.

    Raises:
        SettingsError: a needed role has no split or no file, or the report split also serves training or selection.
    """
    key = f"config key datasets.{name}"
    splits = entry.splits.model_dump()
    local = entry.source.kind == "local" and entry.format is not None
    if local and os.path.isfile(entry.path):
        if len(needed) > 1:
            asked = ", ".join(f"{role} rows (for {by})" for role, by in needed.items())
            raise SettingsError(f"{key}.path: one file cannot hold {asked}; name a folder with one file for each")
        splits = {role: splits[role] or role if role in needed else None for role in splits}
    for role, by in needed.items():
        if splits[role] is None:
            raise SettingsError(f"{key}.splits.{role} is null, but {by} needs it; name a split")
    files = {role: _files(f"{key}.splits.{role}", entry, split, local) for role, split in splits.items() if split}
    for role, found in files.items():
        if not found and (role in needed or splits[role].endswith(DATA_SUFFIXES)):
            there = ", ".join(sorted(os.listdir(entry.path))[:10]) or "nothing"
            raise SettingsError(
                f"{key}.splits.{role}: no file for '{splits[role]}' in {entry.path}, which contains {there}; name "
                "one of its files"
            )
    for role in ("train", "selection"):
        if files.get(role) and files.get(role) == files.get("report"):
            raise SettingsError(
                f"{key}.splits.{role} and .report are both '{splits['report']}', so reports would use data that "
                f"{'models are trained on' if role == 'train' else 'candidates are chosen by'}; name another split "
                "for one of them, or set one to null"
            )
    return entry.model_copy(update={"splits": Splits.model_validate(splits)})


def _files(key: str, entry: StudyDataset, split: str, local: bool) -> list[Path] | list[str]:
    """Return a split's local files, or its name on the hub."""
    if not local:
        return [split]
    try:
        return local_files.files_of(entry.path, entry.format, split)
    except SettingsError as error:
        raise SettingsError(f"{key}: {error}") from None


def _check_roles(key: str, splits: Mapping[str, str | None]) -> None:
    for role, split in splits.items():
        if split not in (None, *splits):
            raise SettingsError(
                f"config key {key}.splits.{role}: found '{split}'; valid for a miniature are {', '.join(splits)}"
            )


def check_rows(data: TrainingData, key: str) -> None:
    """Reject a mixture of nothing, and a validation data set that is also trained on.

    Args:
        data: the section `finetune.data`.
        key: its key, as messages name it.
    """
    trained = [data.dataset] if isinstance(data.dataset, str) else data.dataset
    if not trained:
        raise SettingsError(f"{key}.dataset: names no data set; name at least one")
    if data.validation in trained:
        raise SettingsError(
            f"{key}.validation: '{data.validation}' is also trained on; name another data set, or set {key}.val_size"
        )


def _under_data_root(text: str, key: str, data_root: str | None, workdir: str) -> str:
    marker = "{data_root}"
    if text != marker and not text.startswith(marker + "/"):
        return text
    if data_root is None:
        raise SettingsError(
            f"config key data_root is not set, but {key} is '{text}'; set it to the folder of your data"
        )
    root = absolute(data_root, workdir)
    if not os.path.isdir(root):
        raise SettingsError(f"config key data_root: there is no folder {data_root} (looked at {root})")
    return root + text.removeprefix(marker)
