"""Find, read and digest the definitions of tasks, from lm-eval or from a user's folder of YAML files."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from coppice.core import fingerprints, records
from coppice.core.aliases import Json, PathLike, Record
from coppice.core.errors import SettingsError, nearest
from coppice.study import layout
from coppice.study.settings import registry

from . import lm_eval_compat

KEY = "evaluate.zero_shot.tasks"
REFUSED = {
    "class": "is a Python class instead of a definition",
    "unsafe_code": "runs the code that the model writes",
    "doc_to_image": "shows images",
    "doc_to_audio": "plays sounds",
}


def find(name: str, include_path: PathLike | None = None) -> Path:
    """Return the YAML file that defines the task `name`, in the folder `include_path` or else in lm-eval.

    Raises SettingsError if there is none, or if the name is that of a group.
    """
    folders = [registry.tasks_in(include_path)] if include_path else []
    if not any(name in folder.files for folder in folders) and name in registry.OFFICIAL:
        # The files of these tasks are known, so lm-eval's whole folder need not be searched.
        return registry.definition_file(name)
    folders.append(registry.harness_tasks())
    for folder in folders:
        if name in folder.files:
            return folder.files[name]
    if any(name in folder.groups for folder in folders):
        raise SettingsError(f"{KEY}: '{name}' is a group of tasks. Name the tasks themselves.")
    names = [task for folder in folders for task in folder.files]
    raise SettingsError(f"{KEY}: lm-eval has no task '{name}'{nearest(name, names)}")


@cache
def definition(name: str, include_path: PathLike | None = None) -> Record:
    """Return the configuration of the task `name` with its functions imported. It is cached: do not change it."""
    return _loaded(name, include_path, resolve_func=True)


def facts(name: str, include_path: PathLike | None = None) -> Record:
    """Return {version, shots (examples in a prompt), definition (digest of the YAML and of the Python that it calls)}.

    If a task calls any code in the user's folder, that code may import or read any other file there. The digest then
    covers all files of the folder except other definitions and hidden files.
    """
    # Keep functions as text: the digest needs the files that they are in, and no code should run for it.
    config = _loaded(name, include_path, resolve_func=False)
    roots = [str(Path(folder).resolve()) for folder in (include_path, registry.harness_folder()) if folder]
    code = set()
    text = json.dumps(_without(roots, config, code), default=str, sort_keys=False)
    own = Path(include_path).resolve() if include_path else None
    if own and any(path.is_relative_to(own) for path in code):
        defining = set(registry.tasks_in(own).files.values())
        others = (path for path in map(Path, layout.definition_files(own)) if path not in defining)
        code |= {path for path in others if not any(part.startswith(".") for part in path.relative_to(own).parts)}
    digests = sorted(map(fingerprints.file_digest, code))
    return {
        "version": (config.get("metadata") or {}).get("version"),
        "shots": config.get("num_fewshot"),
        "definition": records.digest([json.loads(text), digests]),
    }


def _without(roots: Sequence[str], value: Json, code: set[Path]) -> Json:
    """Return `value` with the paths of `roots` removed from the functions that it names; add their files to `code`.

    The digest must not depend on where the folders are.
    """
    if isinstance(value, dict):
        return {str(key): _without(roots, item, code) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(roots, item, code) for item in value]
    root = next((root for root in roots if isinstance(value, str) and value.startswith(root)), None)
    if root is None:
        return value
    file = Path(value.rpartition(".")[0] + ".py")
    if file.is_file():
        code.add(file)
    return value.removeprefix(root)


def _loaded(name: str, include_path: PathLike | None, resolve_func: bool) -> Record:
    path = find(name, include_path)
    try:
        config = lm_eval_compat.load_yaml(path, resolve_func)
    except Exception as error:  # a definition imports its own code, which can raise anything
        raise SettingsError(f"{KEY}: {path}: the definition of '{name}' does not load: {error}") from error
    for key, reason in REFUSED.items():
        if config.get(key):
            raise SettingsError(f"{KEY}: '{name}' {reason}, so it cannot be scored here. Remove it.")
    return config


def official_source(name: str, include_path: PathLike | None = None) -> Record:
    """Return the dataset and splits that a task's definition names, in the form of a `datasets` entry."""
    config = definition(name, include_path)
    report = config.get("test_split") or config.get("validation_split")
    selection = config.get("validation_split") if config.get("test_split") else None
    train = config.get("training_split") or config.get("fewshot_split")
    splits = {"train": train, "selection": selection, "report": report}
    if config.get("custom_dataset") or not config.get("dataset_path"):
        raise SettingsError(
            f"{KEY}: the definition of '{name}' names no dataset or loads it with its own code. Add datasets.{name}."
        )
    options = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
    return {
        "path": config["dataset_path"],
        "name": config.get("dataset_name"),
        "splits": {role: split for role, split in splits.items() if split not in (None, *_before(splits, role))},
        "options": options,
    }


def _before(splits: Mapping[str, str | None], role: str) -> list[str | None]:
    """Return the splits of the roles that take precedence over `role`, because no row may serve two roles."""
    order = ("report", "selection", "train")
    return [splits[other] for other in order[: order.index(role)]]
