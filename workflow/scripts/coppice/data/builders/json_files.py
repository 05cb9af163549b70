"""Read the JSON, JSON lines, CSV and Parquet files that data sets are built from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coppice.core.aliases import Json, PathLike, Record
from coppice.core.errors import DataError
from coppice.core.json_text import parsed

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def content(path: PathLike) -> Json:
    """Return the content of a JSON file; raise DataError if it cannot be read."""
    try:
        return parsed(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def rows(path: PathLike) -> list[Record]:
    """Return the rows of a file; raise DataError if it cannot be read or a row is no mapping."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: has an unsupported suffix; valid are {', '.join(SUFFIXES)}")
    found = content(path) if suffix == ".json" else _lines(path) if suffix == ".jsonl" else _table(path, suffix)
    if not isinstance(found, list):
        raise DataError(f"{path}: holds no list of rows. Put the rows into a list, or one JSON object on each line.")
    for place, row in enumerate(found):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {place} (from 0) is no JSON object.")
    return found


def _lines(path: PathLike) -> list[Json]:
    found = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                found += [parsed(line)] if line.strip() else []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{path}: the line after row {len(found) - 1} (from 0) is no JSON: {error}") from error
    return found


def _table(path: PathLike, suffix: str) -> list[Record]:
    import pandas
    import pyarrow.lib
    import pyarrow.parquet

    try:
        if suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        table = pandas.read_csv(path, keep_default_na=False, na_values=[""])
    except (OSError, ValueError, pyarrow.lib.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {error}") from error
    return table.astype(object).where(table.notna(), None).to_dict("records")


def cell(row: Json, column: str, where: str) -> Json:
    """Return a row's value in a column; raise DataError if it has none or is no row."""
    if not isinstance(row, dict) or row.get(column) is None:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else "no keys"
        raise DataError(f"{where}: has no {column} (it has {has}).")
    return row[column]


def name(row: Json, column: str, where: str) -> str | int:
    """Return a row's name of something in a column; raise DataError if it is neither text nor a whole number."""
    found = cell(row, column, where)
    if not isinstance(found, str | int):
        raise DataError(f"{where}: its {column} is {found!r}, which is neither text nor a whole number.")
    return found


def number(value: Json, what: str, where: str) -> float:
    """Return a number; raise DataError if it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise DataError(f"{where}: its {what} is {value!r}, which is no number.")
    return float(value)


def as_list(value: Json) -> Sequence[Json]:
    """Return a value as a list: a list itself, None as an empty one, anything else as its only element."""
    return [] if value is None else value if isinstance(value, list) else [value]
