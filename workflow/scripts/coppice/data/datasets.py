"""The one place that reads a dataset: hub, local files or generated, all brought to one form.

`prepare` turns any source into parquet files, one a role, beside a `dataset.json` record; everything after it reads
those through `load`. The roles: `train` is trained on, `selection` scores candidates, `report` is what reports use.
Selection and report never share a row: where the source has no split of its own for selection, a fixed sample of
train serves, else (if asked for) a fixed part of the report rows, which the report then leaves out and says so.
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
SELECTION_ROWS = 1000  # rows of train that stand in for a selection split
SELECTION_SHARE = 5  # one report row in five goes to selection where there is nothing else

READING = {"csv": {"keep_default_na": False, "na_values": [""]}}  # "None" and "NA" are answers, not holes

# To find brackets opened one after another with none closed, whatever stands between them
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


# task -> its column of right answers, and which a row can have; by lm-eval a row with any other is one answered wrongly
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
    """Read the dataset `name` from its source and write `folder/{role}.parquet` and `folder/dataset.json`.

    `entry` is its resolved configuration (path, name, revision, format, columns, splits: role -> split or file; uses:
    what it has to serve, `text` or `training`). Raises DataError where a split, file or column is missing, a role has
    no rows, or a column does not hold what its use needs.
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
            raise DataError(f"datasets.{name}: none of its splits ({', '.join(splits.values())}) is at {entry['path']}")
        notes = _add_selection(tables, needs_selection)
        if "text" not in (entry.get("uses") or ()):  # lines of a running text come again
            notes += _keep_apart(name, tables)
        write(name, tables, folder, splits=splits, source=_public(entry), notes=notes, clock=clock, files=files)


@contextlib.contextmanager
def _scratch(folder):
    """A folder for what `datasets` keeps of local files: its own cache knows them by name and time, not by content."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=folder, prefix=disks.partial_name())
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(entry, split):
    """The local files of a split, none of a data set of the hub."""
    return local_files.files_of(entry["path"], entry["format"], split) if entry.get("format") else []


def _public(entry):
    return {key: entry.get(key) for key in ("path", "name", "revision", "commit", "format", "columns")}


def _read(name, entry, split, files, scratch):
    """One split as a `datasets.Dataset`, or None where a local folder does not have it."""
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
            raise DataError(f"datasets.{name}: {entry['path']} does not load: {error}") from error
        except Exception as error:  # whatever the library makes of what the hub said
            raise hub.refusal(f"datasets.{name}", entry["path"], entry.get("revision"), error) from error
    if not files:
        return None
    try:
        for file in files if entry["format"] == "json" else ():
            _check_json(file)
        named = {"rows": [glob.escape(str(file)) for file in files]}
        options = READING.get(entry["format"], {})
        table = datasets.load_dataset(entry["format"], data_files=named, split="rows", cache_dir=scratch, **options)
        table.data.table.validate(full=True)  # text of another encoding than UTF-8
    except Exception as error:  # a garbled file raises whatever the parser of its format raises
        reason = (str(error.__cause__ or error).splitlines() or ["it is empty"])[0]
        reason = "it holds no rows" if "no data" in reason or "at least one example" in reason else reason
        raise DataError(
            f"datasets.{name}: {', '.join(map(str, files))}: cannot be read as {entry['format']}: {reason}"
        ) from error
    if entry["format"] == "csv" and _has_unnamed_cells(table, files):
        raise DataError(
            f"datasets.{name}: {', '.join(map(str, files))}: its rows have more cells than its header; quote cells "
            "that hold commas, take commas at the end of rows away, and separate cells by commas"
        )
    if entry["format"] == "text":  # the mark by which some editors begin a file is none of its text
        return table.map(lambda row: {"text": row["text"].removeprefix("\ufeff").strip()})
    return table


def _has_unnamed_cells(table, files):
    """Whether rows of CSV files have a cell more than their header: pandas takes the first one for a row's name, and
    every other one moves by a column. A frame that was written with such names has a column that is called so."""
    added = [column for column in table.column_names if column.startswith("__index_level_")]
    headers = []
    for file in files if added else ():
        with open(file, encoding="utf-8", errors="replace") as lines:
            headers.append(lines.readline())
    return any(column not in header for column in added for header in headers)


def _check_json(file):
    """Raise ValueError for JSON by which arrow would end the process without a word: deep nesting, null rows."""
    with open(file, "rb") as content:
        before = b"}\n"
        while part := content.read(2**24):
            deep = b"[" * DEEPEST in (before + part).translate(BRACKETS, NO_BRACKETS)
            if deep or re.search(rb"\}\r?\n\s*null\s*(\n|\Z)", before + part):
                raise ValueError(f"it has {f'brackets more than {DEEPEST} deep' if deep else 'a row that is null'}")
            before = part[-(2**16) :]


def _rename(name, table, columns, required, split):
    """Bring the columns to their canonical names and check that the required ones are there."""
    for canonical, actual in columns.items():
        if actual not in table.column_names:
            raise DataError(
                f"datasets.{name}.columns.{canonical}: split {split} has no column '{actual}' "
                f"(it has {', '.join(table.column_names)})"
            )
        if list(columns.values()).count(actual) > 1:
            raise DataError(f"datasets.{name}.columns.{canonical}: the column '{actual}' serves twice; name another")
    # all at once: one that is taken for another's name may have a new name itself
    moved = {actual: canonical for canonical, actual in columns.items() if actual != canonical}
    replaced = [canonical for canonical in moved.values() if canonical in table.column_names and canonical not in moved]
    table = table.remove_columns(replaced).rename_columns(moved)
    missing = [column for column in required if column not in table.column_names]
    if missing:
        raise DataError(
            f"datasets.{name}: split {split} lacks the column {', '.join(missing)} "
            f"(it has {', '.join(table.column_names)}); map it with datasets.{name}.columns"
        )
    return table


def _check_columns(name, table, role, uses, required):
    """Refuse a column that does not hold what it is used for, and rows that lack what a task needs."""
    whole = {column: False for column in required}  # column -> whether it has to be text
    if "text" in uses:
        whole["text"] = True
    for column, is_text in whole.items():
        if column not in table.column_names:
            raise DataError(
                f"datasets.{name}: its {role} rows lack the column {column} (they have "
                f"{', '.join(table.column_names)}); map it with datasets.{name}.columns"
            )
        cells = table.data.column(column)
        if cells.null_count:
            empty = cells.is_null().index(True).as_py()
            raise DataError(f"datasets.{name}: row {empty} of its {role} rows (from 0) has no {column}")
        if is_text:
            _check_is_text(name, table, column)
    if "training" in uses and role == "train":
        for column in prompts.KINDS[prompts.kind_of(table.column_names, name)]:
            if column != "messages":
                _check_is_text(name, table, column)


def _check_answers(name, table, role, required):
    """Refuse rows of one of the seven tasks (its columns are `required`) that name none of their choices as right."""
    if not required or name not in ANSWERS or role == "train":
        return
    column, valid = ANSWERS[name]
    for place, row in enumerate(table.select_columns(list(required))):
        where = f"datasets.{name}: row {place} of its {role} rows (from 0)"
        try:
            found = list(valid(row))
        except (TypeError, KeyError) as error:
            raise DataError(f"{where}: has no choices as the task needs them ({error!r})") from error
        answer = row[column].lstrip() if isinstance(row[column], str) else row[column]  # as OpenBookQA's is read
        if answer not in found or isinstance(answer, float):
            raise DataError(
                f"{where}: {column} is {row[column]!r}, which is none of {', '.join(map(repr, found))}; rows of public "
                "test splits have no answers: name another split, or write the answers so"
            )


def _check_is_text(name, table, column):
    kind = getattr(table.features[column], "dtype", "lists or mappings")
    if kind not in ("string", "large_string"):
        raise DataError(f"datasets.{name}: the column {column} holds {kind}, where text is needed")


def _add_selection(tables, needed):
    """Give `tables` a selection role where it lacks one, by the rules of the module's head; returns what was done."""
    if "selection" in tables or not needed:
        return []
    if "train" in tables:
        digests = ((_row_digest(row), place) for place, row in enumerate(tables["train"]))
        chosen = sorted(place for _, place in heapq.nsmallest(SELECTION_ROWS, digests))
        tables["selection"] = tables["train"].select(chosen)
        return [f"selection: a fixed sample of {len(chosen)} rows of train"]
    if "report" not in tables:
        return []
    report = tables["report"]
    marks = [int(_row_digest(row), 16) % SELECTION_SHARE == 0 for row in report]
    tables["selection"] = report.select([i for i, mark in enumerate(marks) if mark])
    tables["report"] = report.select([i for i, mark in enumerate(marks) if not mark])
    kept = len(tables["report"])
    return [f"selection: a fixed part of the report split ({len(report) - kept} rows), which reports leave out"]


def _keep_apart(name, tables):
    """Take rows that the reports use out of those that candidates are scored on; says how many these were."""
    if not {"selection", "report"} <= tables.keys():
        return []
    reported = {_row_digest(row) for row in tables["report"]}
    kept = [place for place, row in enumerate(tables["selection"]) if _row_digest(row) not in reported]
    twice = len(tables["selection"]) - len(kept)
    if not kept:
        raise DataError(
            f"datasets.{name}: its selection rows are all among its report rows: candidates would be chosen on what is "
            f"reported; name another split as datasets.{name}.splits.selection, or null"
        )
    if twice:
        tables["selection"] = tables["selection"].select(kept)
    return [f"selection: {twice} rows are left out that are report rows too"] if twice else []


def _row_digest(row):
    return hashlib.sha256(row_text(row).encode()).hexdigest()


def row_text(row):
    """Canonical text of a row, by which it is told from others; what JSON has no form for stands as Python shows it."""
    try:
        return records.canonical(row)
    except (ValueError, TypeError):  # NaN, dates, bytes: in columns that nothing here reads
        return records.canonical(_plain(row))


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    known = value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    return value if known else repr(value)


def write(name, tables, folder, splits, source, notes=(), clock=None, files=None):
    """Write prepared `tables` (role -> Dataset or list of rows) and their record; fingerprints are of the rows.

    clock: runs since the work began that made the tables; files: role -> the local files that it was read from.
    """
    import datasets

    datasets.disable_progress_bars()
    folder = Path(folder)
    roles = {}
    for role, table in tables.items():
        if not len(table):
            raise DataError(f"datasets.{name}: its {role} split has no rows")
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
    """Hex SHA-256 of rows, dictionaries in their order, whatever file they lie in."""
    content = hashlib.sha256()
    for row in rows:
        content.update(row_text(row).encode())
    return content.hexdigest()


def load(record, role):
    """The rows of one role of a prepared dataset, as a `datasets.Dataset`; `record` is the path of its dataset.json."""
    import datasets
    import pyarrow.parquet

    known = facts(record, role).get("sha256")  # older records do not have it
    path, remedy = Path(record).parent / f"{role}.parquet", f"delete {record} and run snakemake again"
    try:
        if known and fingerprints.content_digest(path) != known:
            raise DataError(f"{path}: was changed after it was written (its checksum differs); {remedy}")
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    return datasets.Dataset(table)


def facts(record, role):
    """{rows, split, fingerprint, notes} of one role of a prepared dataset, for provenance."""
    content = records.read(record)
    if role not in content["roles"]:
        raise DataError(
            f"dataset {content['name']} has no rows for {role} (it has {', '.join(content['roles'])}); "
            f"add datasets.{content['name']}.splits.{role}"
        )
    return content["roles"][role] | {"notes": content["notes"]}


def fingerprint(record, role):
    """Fingerprint of one role's rows; None where the dataset has no such role."""
    return records.read(record)["roles"].get(role, {}).get("fingerprint")


def texts(record, role):
    """The `text` column of one role, as a list of strings."""
    table = load(record, role)
    if "text" not in table.column_names:
        name = records.read(record)["name"]
        raise DataError(f"dataset {name}: has no column text (it has {', '.join(table.column_names)})")
    return table["text"]
