"""Find records in a shared `resources` folder that another study made with other settings under the same name.

Snakemake compares settings with those of earlier runs only within one working directory. If several studies share a
resources folder, it would accept any file of the right name, so this module compares the records with the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from coppice.core import fingerprints, records
from coppice.core.aliases import Record

from . import local_files

if TYPE_CHECKING:
    from . import layout
    from .settings import Study
    from .settings.resolved import StudyDataset, StudyModel

Entry = TypeVar("Entry")  # what a record is compared with: a model or a data set of the study
Difference = tuple[str, object, object]  # (setting, recorded value, wanted value)


def differing_records(study: Study, files: layout.Files) -> dict[str, str]:
    """Return {path: difference} of the records that do not match the study's settings.

    Missing and unreadable records are skipped: the jobs that make or read them deal with them. A data set is compared
    by its source only, not by whether some of its rows were reserved for selection.

    Args:
        study: a settings.Study.
        files: its layout.Files.

    Returns:
        The difference is a clause such as "was made with base A, but models.X.base is B".
    """
    found: dict[str, str | None] = {}
    for name in study.active_models():
        wanted = study.models[name]
        if wanted.source.kind != "miniature":
            found[files.model(name)] = _difference(files.model(name), f"models.{name}", wanted, _of_model)
    for name, entry in study.datasets.items():
        if entry.source.kind != "miniature":
            found[files.dataset(name)] = _difference(files.dataset(name), f"datasets.{name}", entry, _of_dataset)
    return {path: words for path, words in found.items() if words}


def _difference(
    path: str, section: str, wanted: Entry, differing: Callable[[Record, Entry], Difference | None]
) -> str | None:
    """Return in words how the record at `path` differs from the settings `wanted`, or None."""
    try:
        differs = differing(records.read(path), wanted)
    except records.RecordError:
        return None
    if differs is None:
        return None
    key, theirs, ours = differs
    return f"was made with {key} {theirs}, but {section}.{key} is {ours}"


def _of_model(record: Record, wanted: StudyModel) -> Difference | None:
    """Return (key, recorded value, wanted value) of the first setting that differs, or None."""
    if record["source"] != wanted.source.model_dump():
        return "base", record["source"]["path"], wanted.source.path
    return _of_revision(record["revision"], record.get("commit"), wanted)


def _of_revision(revision: str | None, commit: str | None, wanted: StudyModel | StudyDataset) -> Difference | None:
    """Compare revisions. A study that pins the commit which the record's branch or tag led to asks for the same one."""
    return None if wanted.revision in (revision, commit) else ("revision", revision, wanted.revision)


def _of_dataset(record: Record, entry: StudyDataset) -> Difference | None:
    """Return (key, recorded value, wanted value) of the first setting that differs, or None."""
    source, splits = record["source"], {role: split for role, split in entry.splits.model_dump().items() if split}
    if source["path"] != entry.source.path and not _same_files(record, entry):
        return "path", source["path"], entry.source.path
    given = record["provenance"]["settings"]["splits"]
    for key, theirs, ours in (
        *((key, source[key], getattr(entry, key)) for key in ("name", "format", "columns")),
        ("splits", given, splits),
    ):
        if theirs != ours:
            return key, theirs, ours
    return _of_revision(source["revision"], source.get("commit"), entry)


def _same_files(record: Record, entry: StudyDataset) -> bool:
    """Return whether a data set's local files have the recorded contents, even if they lie in another place now."""
    if not entry.format:
        return False
    splits = [split for split in entry.splits.model_dump().values() if split]
    paths = {path for split in splits for path in local_files.files_of(entry.source.path, entry.format, split)}
    read = record["provenance"]["fingerprints"]["files"]
    return {path.name: fingerprints.file_digest(path) for path in paths} == read
