"""Read a study's candidates: the points of a pruning grid, or the rows of the user's own table."""

import csv
import math
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from coppice.core.aliases import Record
from coppice.core.errors import SettingsError, nearest
from coppice.models import pickles
from coppice.stats import metrics

from .. import layout
from . import registry
from .sections.candidates import Calibration, GridPoint
from .sources import absolute, check_name, check_paths

PARTS = ("mlp", "attention")
WHICH_AND_WHEN: Record = {"keep_blocks": {"first": 0, "last": 0}, "steps": 1}
# method -> its settings besides `ratio`, with their defaults
OF_METHOD = {
    "depth": {"importance": "block-influence", "consecutive": False, **WHICH_AND_WHEN},
    "width": {"importance": "taylor", "parts": list(PARTS), "ranking": "uniform", **WHICH_AND_WHEN},
    "unstructured": {"importance": "wanda", "pattern": None},
}
OF_EVERY_METHOD = ("method", "ratio", "tower", "name")
IMPORTANCES = {
    "depth": ("block-influence", "perplexity", "taylor"),
    "width": ("taylor", "taylor-second", "taylor-mixed", "activation", "magnitude"),
    "unstructured": ("wanda", "wanda-one-shot", "sparsegpt", "magnitude"),
}
REQUIRED = ("model", "candidate", "path")
RANGES = {entry.alias: (entry.low, entry.high) for entry in metrics.METRICS if entry.alias}


def grid(points: Iterable[GridPoint], key: str) -> dict[str, Record]:
    """Return {name: point} of a grid, points completed with names and defaults. key: the grid's, for messages."""
    candidates = {}
    for i, point in enumerate(points):
        where = f"config key {key}[{i}]"
        spec = _completed(point, where)
        check_name(spec["name"], f"{where}.name")
        if spec["name"] in candidates:
            raise SettingsError(
                f"{where}: there is already a candidate '{spec['name']}'; remove one of them or give it another name"
            )
        candidates[spec["name"]] = spec
    return candidates


def _completed(point: GridPoint, where: str) -> Record:
    """Return the point with all settings of its method. Raises SettingsError for a setting that the method lacks."""
    spec = point.model_dump(exclude_none=True)
    method = spec["method"]
    for key in spec:
        if key not in (*OF_METHOD[method], *OF_EVERY_METHOD):
            raise SettingsError(f"{where}.{key}: is not a setting of method {method}; remove it or change the method")
    spec = {**OF_METHOD[method], **spec}
    valid = IMPORTANCES.get(method, ())
    if valid and spec["importance"] not in valid:
        raise SettingsError(f"{where}.importance: found {spec['importance']}; method {method} takes {', '.join(valid)}")
    if spec.get("pattern"):
        kept, of = map(int, spec["pattern"].split(":"))
        if abs(1 - kept / of - spec["ratio"]) > 1e-6:
            raise SettingsError(
                f"{where}.ratio: found {spec['ratio']}; the pattern {kept}:{of} needs {1 - kept / of:.7g}"
            )
    if "parts" in spec:
        spec["parts"] = [part for part in PARTS if part in spec["parts"]]
    return {**spec, "name": spec.get("name") or _name(spec)}


def _name(spec: Record) -> str:
    words = [*([spec["tower"]] if "tower" in spec else []), spec["method"], f"{spec['ratio']:g}"]
    if spec["method"] == "width":
        words.append(spec["importance"])
        words += [] if spec["parts"] == list(PARTS) else spec["parts"]
        words += ["global"] * (spec["ranking"] == "global")
    if spec["method"] == "unstructured":
        words += [spec["importance"], *([spec["pattern"].replace(":", "-")] if spec["pattern"] else [])]
    if spec["method"] == "depth" and spec["importance"] != "block-influence":
        words.append(spec["importance"])
    keep = spec.get("keep_blocks", {})
    words += ["keep", *(str(keep[end]) for end in ("first", "last"))] if any(keep.values()) else []
    words += ["steps", str(spec["steps"])] if spec.get("steps", 1) > 1 else []
    return "-".join(words + ["consecutive"] * spec.get("consecutive", False))


def calibration(section: Calibration) -> Calibration:
    """Return the section with the windows that suit its data set, if none are given."""
    usual = "within-rows" if section.dataset in registry.DOCUMENTS else "running"
    return section.model_copy(update={"windows": section.windows or usual})


def table(path: str, workdir: str, measured: Collection[str]) -> tuple[list[str], list[Record]]:
    """Read and check the table of candidates.

    Args:
        path: of the TSV or CSV file, relative to `workdir`.
        workdir: the working directory, also for the paths in the table.
        measured: metrics that candidates are scored by; values in a column of that name must lie in the metric's range.

    Returns:
        (columns, rows). A row has model, candidate, path (absolute), acc and ppl (or None), `given` (all its other
        values by column) and `row` (its line in the file).

    Raises:
        SettingsError: names the file, the row (line of the file) and the column.
    """
    file = Path(absolute(path, workdir))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SettingsError(f"config key candidates.table: there is no file {path} (looked at {file})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"config key candidates.table: {path} cannot be read as a text table ({error})") from error
    lines = text.splitlines()
    reader = csv.reader(lines, delimiter="\t" if "\t" in (lines[0] if lines else "") else ",")
    try:
        first, *others = [(reader.line_num, cells) for cells in reader] or [(1, [])]
    except csv.Error as error:
        raise SettingsError(f"{path}, row {reader.line_num}: cannot be read as a table row ({error})") from error
    header = _header(path, first[1], measured)
    rows, seen = [], {}
    for number, cells in others:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, row {number}"
        row = _row(header, cells, where, workdir, measured)
        pair = (row["model"], row["candidate"])
        if pair in seen:
            raise SettingsError(
                f"{where}, column candidate: model '{pair[0]}' already has a candidate '{pair[1]}' (row {seen[pair]}); "
                "rename one of them"
            )
        seen[pair] = number
        rows.append({**row, "row": number})
    if not rows:
        raise SettingsError(f"{path}: the table has no rows; add one row per candidate")
    return header, rows


def _header(path: str, cells: Iterable[str], measured: Collection[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    for column in REQUIRED:
        if column not in header:
            raise SettingsError(
                f"{path}, row 1: the column {column} is missing (found {', '.join(header) or 'none'})"
                f"{nearest(column, header)}"
            )
    for place, column in enumerate(header, 1):
        if not column or not column.isprintable():
            raise SettingsError(
                f"{path}, row 1: the name of column {place} is empty or contains invisible characters ('{column}'); "
                "rename it"
            )
        if header.count(column) > 1:
            raise SettingsError(f"{path}, row 1: the column '{column}' appears twice; remove one of them")
    for name in header:
        short = metrics.named(name).alias
        if name in measured and name != short and short in header:
            raise SettingsError(f"{path}, row 1: the columns {short} and {name} both give {name}; remove one of them")
    return header


def _row(header: Sequence[str], cells: Sequence[str], where: str, workdir: str, measured: Collection[str]) -> Record:
    if len(cells) != len(header):
        raise SettingsError(f"{where}: has {len(cells)} cells, but the header has {len(header)}; correct the row")
    values = dict(zip(header, (cell.strip() for cell in cells), strict=True))
    for column in REQUIRED:
        if not values[column]:
            raise SettingsError(f"{where}, column {column}: is empty; fill in the cell")
    for column, value in values.items():
        if not value.isprintable():
            raise SettingsError(f"{where}, column {column}: contains an invisible character ('{value}'); remove it")
    check_name(values["candidate"], f"{where}, column candidate")
    model, candidate, path = (values.pop(column) for column in REQUIRED)
    path = _checkpoint(path, f"{where}, column path", workdir)
    quantities = {column: _quantity(column, measured) for column in values}
    given = {column: _value(value, quantities[column], column, where) for column, value in values.items() if value}
    known = {metric: given.get(metric) for metric in RANGES}
    return {"model": model, "candidate": candidate, "path": path, **known, "given": given}


def _checkpoint(text: str, where: str, workdir: str) -> str:
    path = Path(absolute(text, workdir))
    if path.suffix.lower() in pickles.SUFFIXES and not path.is_dir():
        found = pickles.read(path) if path.is_file() else None
        if found is not None and not found.objects:
            raise SettingsError(
                f"{where}: {text} is a file of tensors; name the folder that it lies in, with its config.json"
            )
        raise SettingsError(
            f"{where}: {text} is a pickle, and Coppice does not load pickles because they can run any code; "
            f"convert it to a checkpoint folder first: {pickles.conversion(text)}"
        )
    if not os.path.exists(path):  # not Path.exists, which raises OSError if the text is too long for a path
        raise SettingsError(f"{where}: there is no folder {text} (looked at {path})")
    if not os.path.isfile(path / "config.json"):
        pickled = pickles.found_in(path) if path.is_dir() else None
        if pickled is not None:
            raise SettingsError(
                f"{where}: {text} is not a checkpoint folder, but holds the pickle {pickled.name}, and Coppice does "
                "not load pickles because they can run any code; convert it to a checkpoint folder first: "
                f"{pickles.conversion(os.path.join(text, pickled.name))}"
            )
        raise SettingsError(f"{where}: {text} is not a checkpoint folder, because it has no config.json ({path})")
    try:
        check_paths([str(path), *layout.candidate_files(path)], where)
    except OSError as error:
        raise SettingsError(f"{where}: {text} cannot be read ({error})") from error
    return str(path)


def _quantity(column: str, measured: Collection[str]) -> str:
    """Return the key of `RANGES` for the range in which a column's values must lie, else the column's name.

    Columns that are not measured metrics, and metrics of the user's own tasks, have no known range.
    """
    if column not in measured:
        return column
    return metrics.AVERAGE.alias if column in registry.TASKS else metrics.named(column).alias or column


def _value(text: str, quantity: str, column: str, where: str) -> float | str:
    """Return the value of a cell: a number, checked if its `quantity` has a range, else a number or text."""
    if quantity not in RANGES:
        return _number_or_text(text)
    low, high = RANGES[quantity]
    value = _number_or_text(text)
    if not (isinstance(value, float) and low <= value <= high):
        valid = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a finite number of at least {low:g}"
        raise SettingsError(f"{where}, column {column}: found '{text}', must be {valid}, or empty if it is not known")
    return value


def _number_or_text(text: str) -> float | str:
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text
