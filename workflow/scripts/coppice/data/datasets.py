"""Read datasets from the hub, from local files or generated, and bring them all to one form.

`prepare` turns any source into one parquet file per role and a `dataset.json` record; all other code reads them through
`load`. The roles: `train` rows are trained on, `selection` rows score candidates, `report` rows give the numbers of the
reports. Selection and report never share a row. If the source has no split for selection, a fixed sample of `train` is
used; without `train`, a fixed part of the report rows, which the reports then leave out, as the record notes.
"""

import contextlib
import glob
import hashlib
import heapq
import logging
import math
import re
import shutil
import tempfile
from pathlib import Path

from coppice.core import disks, fingerprints, records
from coppice.core.errors import DataError
from coppice.study import local_files

from . import hub, prompts

logger = logging.getLogger("coppice.data")

ROLES = ("train", "selection", "report")
SELECTION_ROWS = 1000  # rows of train to use if there is no selection split
SELECTION_SHARE = 5  # one report row in five goes to selection if there are neither selection nor train rows

READING = {"csv": {"keep_default_na": False, "na_values": [""]}}  # "None" and "NA" may be answers: keep them

# `translate` with these reduces JSON to brackets, so that deep nesting shows as a run of opening brackets.
BRACKETS = bytes.maketrans(b"{}", b"[]")
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DEEPEST = 500

TASK_COLUMNS = {
    "boolq": ("question", "passage", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
TRUTHS = ("label", lambda row: (0, 1))
KEYS = ("answerKey", lambda row: row["choices"]["label"])


def _ending_numbers(row):
    numbers = range(len(row["endings"]))
    return [*numbers, *map(str, numbers)]


# task -> (column of right answers, row -> valid values). lm-eval silently counts a row with another value as wrong.
ANSWERS = {
    "boolq": TRUTHS,
    "piqa": TRUTHS,
    "hellaswag": ("label", _ending_numbers),
    "winogrande": ("answer", lambda row: ("1", "2")),
    "arc_easy": KEYS,
    "arc_challenge": KEYS,
    "openbookqa": KEYS,
}


def prepare(name, entry, folder, needs_selection=True, required=()):
    """Read a dataset from its source and write `folder/{role}.parquet` and `folder/dataset.json`.

    Args:
        entry: the resolved configuration: path, name, revision, format, columns, splits (role -> split or file), uses
            (what the dataset is used for: `text`, `training`).
        needs_selection: True if selection rows are needed.
        required: columns that the task needs.

    Raises DataError if a split, file or column is missing, a role is empty, or a column does not hold what it must.
    """
    clock = records.Clock()
    splits = {role: split for role, split in entry["splits"].items() if split and role in ROLES}
    files = {role: _files(entry, split) for role, split in splits.items()}
    tables = {}
    with _scratch(folder) as scratch:
        for role, split in splits.items():
            table = _read(name, entry, split, files[role], scratch)
            if table is not None:
                tables[role] = _rename(name, table, entry.get("columns") or {}, required, split)
                _check_columns(name, tables[role], role, entry.get("uses") or (), required)
                _check_answers(name, tables[role], role, required)
        if not tables:
            named = ", ".join(splits.values())
            raise DataError(f"datasets.{name}.splits: {entry['path']} has none of {named}. Correct the names.")
        notes = _add_selection(tables, needs_selection)
        if "text" not in (entry.get("uses") or ()):  # in running text, lines such as headings repeat legitimately
            notes += _keep_apart(name, tables)
        write(name, tables, folder, splits=splits, source=_public(entry), notes=notes, clock=clock, files=files)


@contextlib.contextmanager
def _scratch(folder):
    """Give a temporary cache folder: the library's permanent cache knows local files by name and time, not content."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=folder, prefix=disks.partial_name())
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(entry, split):
    """Return the local files of a split; empty for a dataset on the hub."""
    return local_files.files_of(entry["path"], entry["format"], split) if entry.get("format") else []


def _public(entry):
    return {key: entry.get(key) for key in ("path", "name", "revision", "commit", "format", "columns")}


def _read(name, entry, split, files, scratch):
    """Return one split as a `datasets.Dataset`, or None if the source does not have it."""
    import datasets

    datasets.disable_progress_bars()
    if not entry.get("format"):
        try:
            revision = entry.get("commit") or entry.get("revision")
            options = {"revision": revision} | (entry.get("options") or {}) | {"split": split}
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


def _has_unnamed_cells(table, files):
    """Return True if rows of CSV files have one cell more than their header, so that pandas shifts all columns by one.

    A frame that was saved with its index names that column in its header and is fine.
    """
    added = [column for column in table.column_names if column.startswith("__index_level_")]
    headers = []
    for file in files if added else ():
        with open(file, encoding="utf-8", errors="replace") as lines:
            headers.append(lines.readline())
    return any(column not in header for column in added for header in headers)


def _check_json(file):
    """Raise ValueError for deep nesting and null rows, on which arrow would crash the process without a message."""
    with open(file, "rb") as content:
        before = b"}\n"  # so that a null row at the very start is found too
        while part := content.read(2**24):
            deep = b"[" * DEEPEST in (before + part).translate(BRACKETS, NO_BRACKETS)
            if deep or re.search(rb"\}\r?\n\s*null\s*(\n|\Z)", before + part):
                raise ValueError(f"it has {f'brackets nested more than {DEEPEST} deep' if deep else 'a null row'}")
            before = part[-(2**16) :]  # what to look for may straddle two parts


def _rename(name, table, columns, required, split):
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


def _check_columns(name, table, role, uses, required):
    """Raise DataError if a column does not hold what its use needs, or a row lacks a value."""
    complete = {column: False for column in required}  # columns without empty cells -> True if they must hold text
    if "text" in uses:
        complete["text"] = True
    for column, is_text in complete.items():
        if column not in table.column_names:
            raise DataError(
                f"datasets.{name}: its {role} rows lack the column {column} (they have "
                f"{', '.join(table.column_names)}). Map it with datasets.{name}.columns."
            )
        cells = table.data.column(column)
        if cells.null_count:
            empty = cells.is_null().index(True).as_py()
            raise DataError(f"datasets.{name}: row {empty} of its {role} rows (from 0) has no {column}. Fill it in.")
        if is_text:
            _check_is_text(name, table, column)
    if "training" in uses and role == "train":
        for column in prompts.KINDS[prompts.kind_of(table.column_names, name)]:
            if column != "messages":
                _check_is_text(name, table, column)


def _check_answers(name, table, role, required):
    """Raise DataError if a row of one of the seven tasks does not name one of its choices as the right one."""
    if not required or name not in ANSWERS or role == "train":
        return
    column, valid = ANSWERS[name]
    for place, row in enumerate(table.select_columns(list(required))):
        where = f"datasets.{name}: row {place} of its {role} rows (from 0)"
        try:
            found = list(valid(row))
        except (TypeError, KeyError) as error:
            raise DataError(f"{where}: the choices have the wrong form ({error!r}). Correct the row.") from error
        # lm-eval strips OpenBookQA's answers on the left, so leading spaces are allowed.
        answer = row[column].lstrip() if isinstance(row[column], str) else row[column]
        if answer not in found or isinstance(answer, float):
            raise DataError(
                f"{where}: {column} is {row[column]!r}, which is not one of {', '.join(map(repr, found))}. Public test "
                "splits are unlabeled: name another split or correct the answers."
            )


def _check_is_text(name, table, column):
    kind = getattr(table.features[column], "dtype", "lists or mappings")
    if kind not in ("string", "large_string"):
        raise DataError(f"datasets.{name}: the column {column} holds {kind}, but must hold text. Convert it.")


def _add_selection(tables, needed):
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
    # Equal rows have equal digests, so copies of a row never end up in both roles.
    selected = [int(_row_digest(row), 16) % SELECTION_SHARE == 0 for row in report]
    tables["selection"] = report.select([i for i, is_selected in enumerate(selected) if is_selected])
    tables["report"] = report.select([i for i, is_selected in enumerate(selected) if not is_selected])
    kept = len(tables["report"])
    return [f"selection: a fixed part of the report split ({len(report) - kept} rows), which reports leave out"]


def _keep_apart(name, tables):
    """Remove the report rows from the selection rows; return notes for the record."""
    if not {"selection", "report"} <= tables.keys():
        return []
    reported = {_row_digest(row) for row in tables["report"]}
    kept = [place for place, row in enumerate(tables["selection"]) if _row_digest(row) not in reported]
    twice = len(tables["selection"]) - len(kept)
    if not kept:
        raise DataError(
            f"datasets.{name}: all selection rows are report rows too, so candidates would be chosen on what is "
            f"reported. Set datasets.{name}.splits.selection to another split or to null."
        )
    if twice:
        tables["selection"] = tables["selection"].select(kept)
    return [f"selection: {twice} rows are left out that are report rows too"] if twice else []


def _row_digest(row):
    return hashlib.sha256(row_text(row).encode()).hexdigest()


def row_text(row):
    """Return a canonical text of a row, to compare rows by. Values without a JSON form are written as their repr."""
    try:
        return records.canonical(row)
    except (ValueError, TypeError):  # NaN, dates or bytes, in columns that the study does not read
        return records.canonical(_plain(row))


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_finite = isinstance(value, float) and math.isfinite(value)
    return value if value is None or isinstance(value, str | bool | int) or is_finite else repr(value)


def write(name, tables, folder, splits, source, notes=(), clock=None, files=None):
    """Write prepared tables and their record.

    Args:
        tables: role -> Dataset or list of rows.
        splits: role -> name of the split, for the record.
        source, notes: facts about the source and notes, for the record.
        clock: a Clock that was started before the tables were made; by default it starts now.
        files: role -> local files that the role was read from.
    """
    import datasets

    datasets.disable_progress_bars()
    folder = Path(folder)
    roles = {}
    for role, table in tables.items():
        if not len(table):
            raise DataError(f"datasets.{name}: its {role} split has no rows. Name another split or file.")
        table = table if isinstance(table, datasets.Dataset) else datasets.Dataset.from_list(table)
        path = folder / f"{role}.parquet"
        with records.atomic(path, "wb") as file:
            table.to_parquet(file)
        roles[role] = {"rows": len(table), "split": splits.get(role, role), "fingerprint": fingerprint_of(table)}
        roles[role]["sha256"] = fingerprints.content_digest(path)
    facts = {"name": name, "roles": roles, "source": source, "notes": list(notes)}
    every = sorted({file for found in (files or {}).values() for file in found})
    digests = {file.name: fingerprints.content_digest(file) for file in every}
    provenance = (clock or records.Clock()).provenance({"splits": splits}, source.get("seed"), files=digests)
    records.write(folder / "dataset.json", facts | {"provenance": provenance})


def fingerprint_of(rows):
    """Return the hex SHA-256 of rows (dictionaries) in their order. It does not depend on the file format."""
    content = hashlib.sha256()
    for row in rows:
        content.update(row_text(row).encode())
    return content.hexdigest()


def load(record, role):
    """Return the rows of one role of the dataset whose dataset.json is `record`, as a `datasets.Dataset`.

    Raises DataError if the dataset has no such role, or if its file cannot be read or has changed.
    """
    import datasets
    import pyarrow.parquet

    expected = facts(record, role).get("sha256")  # missing in older records
    path, remedy = Path(record).parent / f"{role}.parquet", f"Delete {record} and run snakemake again."
    try:
        if expected and fingerprints.content_digest(path) != expected:
            raise DataError(f"{path}: the file was changed after it was written (its checksum differs). {remedy}")
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). {remedy}") from error
    return datasets.Dataset(table)


def facts(record, role):
    """Return {rows, split, fingerprint, notes} of one role of a prepared dataset."""
    content = records.read(record)
    if role not in content["roles"]:
        raise DataError(
            f"dataset {content['name']} has no rows for {role} (it has {', '.join(content['roles'])}). "
            f"Set datasets.{content['name']}.splits.{role}."
        )
    return content["roles"][role] | {"notes": content["notes"]}


def fingerprint(record, role):
    """Return the fingerprint of one role's rows, or None if the dataset has no such role."""
    return records.read(record)["roles"].get(role, {}).get("fingerprint")


def texts(record, role):
    """Return the `text` column of one role, a sequence of strings."""
    table = load(record, role)
    if "text" not in table.column_names:
        name = records.read(record)["name"]
        found = ", ".join(table.column_names)
        raise DataError(f"dataset {name}: no column text (it has {found}). Map one with datasets.{name}.columns.")
    return table["text"]
