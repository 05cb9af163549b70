"""Divide the rows of a file, so that rows which share an image, or anything else, are on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import DataError, SettingsError

from . import json_files, splitting


@dataclass(frozen=True)
class SplitData:
    """Which rows to divide, and what holds them together.

    Attributes:
        source: a JSON, JSON lines, CSV or Parquet file.
        group_by: columns. Rows that have a value in common, in one column, are on one side; a list has several values.
            Without columns only equal rows are.
        sample_count: the number of rows, a sample of whole groups that may go a little beyond; None takes all.
    """

    source: PathLike
    group_by: Sequence[str] = ()
    sample_count: int | None = None

    def __post_init__(self) -> None:
        """Raise SettingsError for a number out of range."""
        if self.sample_count is not None and self.sample_count < 1:
            raise SettingsError("sample_count: must be at least 1")


def split_data(data: SplitData, target: splitting.Target) -> Record:
    """Write the rows of each role; return the report, which is also written beside them.

    Raises:
        SettingsError: A file exists already.
        DataError: The source cannot be read, lacks a column, or nothing is left for a role.
    """
    clock = records.Clock()
    target.check_free()
    rows = json_files.rows(data.source)
    if not rows:
        raise DataError(f"{data.source}: has no rows.")
    groups = groups_of(rows, data.group_by, str(data.source))
    sizes = Counter(groups)
    if data.sample_count is not None:
        kept, total = set(), 0
        for name in splitting.shuffled(sizes, f"sample {target.seed}"):
            if total >= data.sample_count:
                break
            kept.add(name)
            total += sizes[name]
        sizes = Counter({name: size for name, size in sizes.items() if name in kept})
    roles = splitting.roles_of(sizes, target.shares, target.seed)
    found: dict[str, list[Record]] = {role: [] for role in target.shares}
    for row, group in zip(rows, groups, strict=True):
        if group in roles:
            found[roles[group]].append(row)
    counted = {role: sum(own == role for own in roles.values()) for role in target.shares}
    choices = {"source": str(data.source), "group_by": list(data.group_by), "sample_count": data.sample_count}
    return target.write(found, {"choices": choices, "rows": len(rows), "groups": counted}, clock)


def groups_of(rows: Sequence[Record], columns: Sequence[str], where: str) -> list[str]:
    """Return the name of each row's group, a value that only its rows have.

    where: names the file in messages.
    """
    if not columns:
        return [records.canonical(row) for row in rows]
    from scipy.cluster.hierarchy import DisjointSet

    every = DisjointSet()
    keys = []
    for number, row in enumerate(rows):
        values = [
            f"{column} {records.canonical(value)}"
            for column in columns
            for value in json_files.as_list(json_files.cell(row, column, f"{where}, row {number} (from 0)"))
        ]
        if not values:
            raise DataError(f"{where}, row {number} (from 0): has no value in {' or '.join(columns)}.")
        for value in values:
            every.add(value)
            every.merge(values[0], value)
        keys.append(values[0])
    # the first value in the order of the alphabet, so that the order of rows does not matter
    names = {value: min(subset) for subset in every.subsets() for value in subset}
    return [names[key] for key in keys]


def summary(report: Record) -> list[str]:
    """Return the lines that the terminal shows of a report."""
    groups = report["groups"]
    lines = [f"{report['rows']:,} rows in {report['choices']['source']}"]
    return lines + [f"{role}: {own['rows']:,} rows, {groups[role]:,} groups" for role, own in report["roles"].items()]
