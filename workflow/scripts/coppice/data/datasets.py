"""Read datasets from the hub, from local files or generated, and bring them all to one form.

`prepare` turns any source into one parquet file per role and a `dataset.json` record; all other code reads them through
`load`. The roles: `train` rows are trained on, `selection` rows score candidates, `report` rows give the numbers of the
reports. Selection and report never share a row. If the source has no split for selection, a fixed sample of `train` is
used; without `train`, a fixed part of the report rows, which the reports then leave out, as the record notes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import heapq
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core import disks, fingerprints, records
from coppice.core.aliases import Json, PathLike, Record
from coppice.core.errors import DataError
from coppice.study import local_files

from . import hub, picture_rows, row_checks

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("coppice.data")

ROLES = ("train", "selection", "report")
SELECTION_ROWS = 1000  # rows of train to use if there is no selection split
SELECTION_SHARE = 5  # one report row in five goes to selection if there are neither selection nor train rows

READING = {"csv": {"keep_default_na": False, "na_values": [""]}}  # "None" and "NA" may be answers: keep them

# `translate` with these reduces JSON to brackets, so that deep nesting shows as a run of opening brackets.
BRACKETS = bytes.maketrans(b"{}", b"[]")
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DEEPEST = 500


def prepare(
    name: str, entry: Record, folder: PathLike, needs_selection: bool = True, required: Collection[str] = ()
) -> None:
    """Read a dataset from its source and write `folder/{role}.parquet` and `folder/dataset.json`.

    Args:
        name: name of the dataset.
        entry: the resolved configuration: path, name, revision, format, columns, splits (role -> split or file), uses
            (what the dataset is used for: `text`, `training`), image_root (folder of the pictures that rows name; by
            default that of the data file).
        folder: folder to write.
        needs_selection: True if selection rows are needed.
        required: columns that the task needs.

    Raises:
        DataError: a split, file or column is missing, a role is empty, a column does not hold what it must, or a
            picture cannot be used.
    """
    from . import picture_columns  # imports Pillow, which planning a study does not need

    clock = records.Clock()
    splits = {role: split for role, split in entry["splits"].items() if split and role in ROLES}
    files = {role: _files(entry, split) for role, split in splits.items()}
    tables, intake = {}, picture_columns.Intake(name, Path(folder))
    with _scratch(folder) as scratch:
        for role, split in splits.items():
            table = _read(name, entry, split, files[role], scratch)
            if table is not None:
                tables[role] = _rename(name, table, entry.get("columns") or {}, required, split)
                tables[role] = intake.take(tables[role], role, picture_columns.root_of(entry, files[role]))
                row_checks.check_columns(name, tables[role], role, entry.get("uses") or (), required)
                row_checks.check_answers(name, tables[role], role, required)
        if not tables:
            named = ", ".join(splits.values())
            raise DataError(f"datasets.{name}.splits: {entry['path']} has none of {named}. Correct the names.")
        notes = intake.finish()
        for role, table in tables.items():
            row_checks.check_pictures(name, table, role, entry.get("uses") or ())
        notes += _add_selection(name, tables, needs_selection)
        # selection rows that the source does not have come from train or, without it, from report
        roots = {role: intake.roots.get(role) or _first(intake.roots, ("train", "report")) for role in tables}
        if "text" not in (entry.get("uses") or ()):  # in running text, lines such as headings repeat legitimately
            notes += _keep_apart(name, tables)
        write(name, tables, folder, Origin(_public(entry), splits, notes, files, roots), clock)


@contextlib.contextmanager
def _scratch(folder: PathLike) -> Iterator[str]:
    """Give a temporary cache folder: the library's permanent cache knows local files by name and time, not content."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=folder, prefix=disks.partial_name())
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(entry: Record, split: str) -> list[Path]:
    """Return the local files of a split; empty for a dataset on the hub."""
    return local_files.files_of(entry["path"], entry["format"], split) if entry.get("format") else []


def _public(entry: Record) -> Record:
    return {key: entry.get(key) for key in ("path", "name", "revision", "commit", "format", "columns")}


def _read(name: str, entry: Record, split: str, files: Sequence[Path], scratch: str) -> Dataset | None:
    """Return one split as a `datasets.Dataset`, or None if the source does not have it."""
    import datasets

    datasets.disable_progress_bars()
    if not entry.get("format"):
        try:
            revision = entry.get("commit") or entry.get("revision")
            options = {"revision": revision} | (entry.get("options") or {}) | _choice(split)
            return datasets.load_dataset(entry["path"], entry.get("name"), **options)
        except ValueError as error:
            if "Unknown split" in str(error):
                return None
            raise DataError(f"datasets.{name}: {entry['path']} does not load (check its name): {error}") from error
        except Exception as error:  # the library wraps the hub's errors in many types
            raise hub.refusal(f"datasets.{name}", entry["path"], entry.get("revision"), error) from error
    if not files:
        return None
    try:
        for file in files if entry["format"] == "json" else ():
            _check_json(file)
        named = {"rows": [glob.escape(str(file)) for file in files]}
        options = READING.get(entry["format"], {})
        table = datasets.load_dataset(entry["format"], data_files=named, split="rows", cache_dir=scratch, **options)
        table.data.table.validate(full=True)  # raises if text is not UTF-8
    except Exception as error:  # the parsers of the formats raise many types for a damaged file
        reason = (str(error.__cause__ or error).splitlines() or ["it is empty"])[0]
        reason = "it holds no rows" if "no data" in reason or "at least one example" in reason else reason
        raise DataError(
            f"datasets.{name}: {', '.join(map(str, files))}: cannot be read as {entry['format']}: {reason}"
        ) from error
    if entry["format"] == "csv" and _has_unnamed_cells(table, files):
        raise DataError(
            f"datasets.{name}: {', '.join(map(str, files))}: rows have more cells than the header. Quote cells that "
            "contain commas, remove commas at the ends of rows, and separate cells by commas only."
        )
    if entry["format"] == "text":  # some editors begin a file with a byte order mark, which is not part of the text
        return table.map(lambda row: {"text": row["text"].removeprefix("\ufeff").strip()})
    return table


def _choice(split: str) -> Record:
    """Return the options of `load_dataset` for a split of a dataset on the hub: a name with a slash is a file."""
    return {"data_files": {"rows": split}, "split": "rows"} if "/" in split else {"split": split}


def _has_unnamed_cells(table: Dataset, files: Iterable[Path]) -> bool:
    """Return True if rows of CSV files have one cell more than their header, so that pandas shifts all columns by one.

    A frame that was saved with its index names that column in its header and is fine.
    """
    added = [column for column in table.column_names if column.startswith("__index_level_")]
    headers = []
    for file in files if added else ():
        with open(file, encoding="utf-8", errors="replace") as lines:
            headers.append(lines.readline())
    return any(column not in header for column in added for header in headers)


def _check_json(file: Path) -> None:
    """Raise ValueError for deep nesting and null rows, on which arrow would crash the process without a message."""
    with open(file, "rb") as content:
        before = b"}\n"  # so that a null row at the very start is found too
        while part := content.read(2**24):
            deep = b"[" * DEEPEST in (before + part).translate(BRACKETS, NO_BRACKETS)
            if deep or re.search(rb"\}\r?\n\s*null\s*(\n|\Z)", before + part):
                raise ValueError(f"it has {f'brackets nested more than {DEEPEST} deep' if deep else 'a null row'}")
            before = part[-(2**16) :]  # what to look for may straddle two parts


def _rename(name: str, table: Dataset, columns: Mapping[str, str], required: Iterable[str], split: str) -> Dataset:
    """Return the table with columns renamed as configured; raise DataError if a required one is missing."""
    for canonical, actual in columns.items():
        if actual not in table.column_names:
            raise DataError(
                f"datasets.{name}.columns.{canonical}: split {split} has no column '{actual}'. Name one of "
                f"{', '.join(table.column_names)}."
            )
        if list(columns.values()).count(actual) > 1:
            raise DataError(f"datasets.{name}.columns.{canonical}: '{actual}' is mapped twice. Name another column.")
    # Rename all columns at once, because one column's new name may be another column's old one.
    moved = {actual: canonical for canonical, actual in columns.items() if actual != canonical}
    replaced = [canonical for canonical in moved.values() if canonical in table.column_names and canonical not in moved]
    table = table.remove_columns(replaced).rename_columns(moved)
    missing = [column for column in required if column not in table.column_names]
    if missing:
        raise DataError(
            f"datasets.{name}: split {split} lacks the column {', '.join(missing)} "
            f"(it has {', '.join(table.column_names)}). Map it with datasets.{name}.columns."
        )
    return table


def _add_selection(name: str, tables: dict[str, Dataset], needed: bool) -> list[str]:
    """Add a selection role to `tables` if needed, as the module docstring says; return notes for the record."""
    if "selection" in tables or not needed:
        return []
    if "train" in tables:
        # The rows with the smallest digests are a sample that depends on the rows alone, not on a seed or their order.
        digests = ((_row_digest(row), place) for place, row in enumerate(tables["train"]))
        chosen = sorted(place for _, place in heapq.nsmallest(SELECTION_ROWS, digests))
        tables["selection"] = tables["train"].select(chosen)
        return [f"selection: a fixed sample of {len(chosen)} rows of train"]
    if "report" not in tables:
        return []
    report = tables["report"]
    # Equal rows have equal digests, so copies of a row never end up in both roles, nor do rows with the same picture.
    selected = [int(_digests(row)[0], 16) % SELECTION_SHARE == 0 for row in report]
    if not 0 < sum(selected) < len(report):
        raise DataError(
            f"datasets.{name}: its {len(report)} report rows cannot be divided, because there is no split for "
            "selection, and candidates are not chosen on reported rows. Set "
            f"datasets.{name}.splits.selection, or add rows."
        )
    tables["selection"] = report.select([i for i, is_selected in enumerate(selected) if is_selected])
    tables["report"] = report.select([i for i, is_selected in enumerate(selected) if not is_selected])
    kept = len(tables["report"])
    return [f"selection: a fixed part of the report split ({len(report) - kept} rows), which reports leave out"]


def _keep_apart(name: str, tables: dict[str, Dataset]) -> list[str]:
    """Remove the selection rows that are report rows or show their pictures; return notes for the record."""
    if not {"selection", "report"} <= tables.keys():
        return []
    reported = {digest for row in tables["report"] for digest in _digests(row)}
    kept = [place for place, row in enumerate(tables["selection"]) if reported.isdisjoint(_digests(row))]
    twice = len(tables["selection"]) - len(kept)
    what = "show pictures of report rows" if picture_rows.COLUMN in tables["report"].column_names else "are report rows"
    if not kept:
        raise DataError(
            f"datasets.{name}: all selection rows {what} too, so candidates would be chosen on what is "
            f"reported. Set datasets.{name}.splits.selection to another split or to null."
        )
    if twice:
        tables["selection"] = tables["selection"].select(kept)
    return [f"selection: {twice} rows are left out that {what} too"] if twice else []


def _first(found: Mapping[str, str], keys: Sequence[str]) -> str | None:
    return next((found[key] for key in keys if key in found), None)


def _digests(row: Record) -> list[str]:
    """Return the digests of what must not be both in selection and in report: a row's pictures or, without, the row."""
    return picture_rows.digests(row) or [_row_digest(row)]


def _row_digest(row: Record) -> str:
    return hashlib.sha256(row_text(row).encode()).hexdigest()


def row_text(row: Record) -> str:
    """Return a canonical text of a row, to compare rows by. Values without a JSON form are written as their repr."""
    try:
        return records.canonical(row)
    except (ValueError, TypeError):  # NaN, dates or bytes, in columns that the study does not read
        return records.canonical(_plain(row))


def _plain(value: object) -> Json:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_finite = isinstance(value, float) and math.isfinite(value)
    return value if value is None or isinstance(value, str | bool | int) or is_finite else repr(value)


@dataclass(frozen=True)
class Origin:
    """Where the rows of a dataset come from, for its record.

    Attributes:
        source: facts about the source.
        splits: role -> name of the source's split.
        notes: sentences about how the roles were made.
        files: role -> local files that the role was read from.
        image_roots: role -> folder of the pictures that its rows name, if they name any. A relative one lies beside
            dataset.json.
    """

    source: Record = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    image_roots: Mapping[str, str | None] = field(default_factory=dict)


def write(
    name: str,
    tables: Mapping[str, Dataset | Sequence[Record]],
    folder: PathLike,
    origin: Origin | None = None,
    clock: records.Clock | None = None,
) -> None:
    """Write prepared tables and their record.

    Args:
        name: name of the dataset.
        tables: role -> Dataset or list of rows.
        folder: folder to write.
        origin: where the tables come from; by default nothing is known of it.
        clock: a Clock that was started before the tables were made; by default it starts now.

    Raises:
        DataError: a table has no rows.
    """
    import datasets

    datasets.disable_progress_bars()
    folder, origin = Path(folder), origin or Origin()
    roles = {}
    for role, table in tables.items():
        if not len(table):
            raise DataError(f"datasets.{name}: its {role} split has no rows. Name another split or file.")
        table = table if isinstance(table, datasets.Dataset) else datasets.Dataset.from_list(table)
        path = folder / f"{role}.parquet"
        with records.atomic(path, "wb") as file:
            table.to_parquet(file)
        roles[role] = {"rows": len(table), "split": origin.splits.get(role, role), "fingerprint": fingerprint_of(table)}
        roles[role]["sha256"] = fingerprints.content_digest(path)
        if origin.image_roots.get(role):
            roles[role]["image_root"] = origin.image_roots[role]
    facts = {"name": name, "roles": roles, "source": origin.source, "notes": list(origin.notes)}
    every = sorted({file for found in origin.files.values() for file in found})
    digests = {file.name: fingerprints.content_digest(file) for file in every}
    clock = clock or records.Clock()
    provenance = clock.provenance({"splits": dict(origin.splits)}, origin.source.get("seed"), files=digests)
    records.write(folder / "dataset.json", facts | {"provenance": provenance})


def fingerprint_of(rows: Iterable[Record]) -> str:
    """Return the hex SHA-256 of rows (dictionaries) in their order. It does not depend on the file format."""
    content = hashlib.sha256()
    for row in rows:
        content.update(row_text(row).encode())
    return content.hexdigest()


def load(record: PathLike, role: str) -> Dataset:
    """Return the rows of one role of the dataset whose dataset.json is `record`, as a `datasets.Dataset`.

    Raises DataError if the dataset has no such role, or if its file cannot be read or has changed.
    """
    import datasets
    import pyarrow.parquet

    expected = facts(record, role)["sha256"]
    path, remedy = Path(record).parent / f"{role}.parquet", f"Delete {record} and run snakemake again."
    try:
        if fingerprints.content_digest(path) != expected:
            raise DataError(f"{path}: the file was changed after it was written (its checksum differs). {remedy}")
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). {remedy}") from error
    return datasets.Dataset(table)


def facts(record: PathLike, role: str) -> Record:
    """Return {rows, split, fingerprint, notes} of one role of a prepared dataset."""
    content = records.read(record)
    if role not in content["roles"]:
        raise DataError(
            f"dataset {content['name']} has no rows for {role} (it has {', '.join(content['roles'])}). "
            f"Set datasets.{content['name']}.splits.{role}."
        )
    return content["roles"][role] | {"notes": content["notes"]}


def fingerprint(record: PathLike, role: str) -> str | None:
    """Return the fingerprint of one role's rows, or None if the dataset has no such role."""
    return records.read(record)["roles"].get(role, {}).get("fingerprint")


def texts(record: PathLike, role: str) -> Sequence[str]:
    """Return the `text` column of one role, a sequence of strings."""
    table = load(record, role)
    if "text" not in table.column_names:
        name = records.read(record)["name"]
        found = ", ".join(table.column_names)
        raise DataError(f"dataset {name}: no column text (it has {found}). Map one with datasets.{name}.columns.")
    return table["text"]
