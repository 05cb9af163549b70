"""The candidates of a study: points of a pruning grid, or rows of the user's own table."""

import csv
import math
import os
from pathlib import Path

from coppice.core.errors import SettingsError, nearest

from .. import layout
from . import registry
from .sources import absolute, check_name, check_paths

PARTS = ("mlp", "attention")
# What each method takes beside `ratio`, with what holds where nothing is said
OF_METHOD = {
    "depth": {"consecutive": False},
    "width": {"importance": "taylor", "parts": list(PARTS), "ranking": "uniform"},
    "unstructured": {"importance": "wanda", "pattern": None},
}
IMPORTANCES = {"width": ("taylor", "activation", "magnitude"), "unstructured": ("wanda", "magnitude")}
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")
REQUIRED = ("model", "candidate", "path")
RANGES = {"acc": (0.0, 1.0), "ppl": (1.0, math.inf)}
ACCURACIES = ("average_acc", *registry.TASKS)


def grid(points, key):
    """Candidates by name of the grid `points`; each is its point with name and defaults worked out."""
    candidates = {}
    for i, point in enumerate(points):
        where = f"config key {key}[{i}]"
        spec = _completed(point, where)
        check_name(spec["name"], f"{where}.name")
        if spec["name"] in candidates:
            raise SettingsError(f"{where}: there is already a candidate '{spec['name']}'; drop one or give it a name")
        candidates[spec["name"]] = spec
    return candidates


def _completed(point, where):
    """The point with the keys of its method and no other, each with a value."""
    spec = {key: value for key, value in point.items() if value is not None}
    method = spec["method"]
    for key in spec:
        if key not in (*OF_METHOD[method], "method", "ratio", "name"):
            raise SettingsError(f"{where}.{key}: is not a setting of method {method}, which this point has")
    spec = {**OF_METHOD[method], **spec}
    valid = IMPORTANCES.get(method, ())
    if valid and spec["importance"] not in valid:
        raise SettingsError(f"{where}.importance: found {spec['importance']}; method {method} takes {', '.join(valid)}")
    if spec.get("pattern") == "2:4" and spec["ratio"] != 0.5:
        raise SettingsError(f"{where}.ratio: found {spec['ratio']}; the pattern 2:4 removes half of the weights: 0.5")
    if "parts" in spec:
        spec["parts"] = [part for part in PARTS if part in spec["parts"]]
    return {**spec, "name": spec.get("name") or _name(spec)}


def _name(spec):
    words = [spec["method"], f"{spec['ratio']:g}"]
    if spec["method"] == "width":
        words.append(spec["importance"])
        words += [] if spec["parts"] == list(PARTS) else spec["parts"]
        words += ["global"] * (spec["ranking"] == "global")
    if spec["method"] == "unstructured":
        words += [spec["importance"], *(["2-4"] if spec["pattern"] else [])]
    return "-".join(words + ["consecutive"] * spec.get("consecutive", False))


def table(path, workdir, measured):
    """(columns, rows) of the table `path`: each row checked, with acc, ppl (or None) and all values `given`.

    measured: the metrics that candidates have here; a column of such a name holds values of it. SettingsError names the
    file, the row (line of the file) and the column.
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
        raise SettingsError(f"{path}, row {reader.line_num}: cannot be read as a row of a table ({error})") from error
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
                f"{where}, column candidate: model '{pair[0]}' already has a candidate '{pair[1]}', in row {seen[pair]}"
            )
        seen[pair] = number
        rows.append({**row, "row": number})
    if not rows:
        raise SettingsError(f"{path}: the table has no rows")
    return header, rows


def _header(path, cells, measured):
    header = [cell.strip() for cell in cells]
    for column in REQUIRED:
        if column not in header:
            raise SettingsError(
                f"{path}, row 1: the column {column} is missing (found {', '.join(header) or 'none'})"
                f"{nearest(column, header)}"
            )
    for place, column in enumerate(header, 1):
        if not column or not column.isprintable():
            raise SettingsError(f"{path}, row 1: column {place} has no name that can be shown ('{column}')")
        if header.count(column) > 1:
            raise SettingsError(f"{path}, row 1: the column '{column}' is there twice")
    for name in header:
        short = "acc" if name == "average_acc" else name.partition(".")[0]
        if name in measured and name != short and short in header:
            raise SettingsError(
                f"{path}, row 1: the column {short} stands for {name} too, which has a column of its own; leave one of "
                "them out"
            )
    return header


def _row(header, cells, where, workdir, measured):
    if len(cells) != len(header):
        raise SettingsError(f"{where}: has {len(cells)} cells, but the header has {len(header)}")
    values = dict(zip(header, (cell.strip() for cell in cells), strict=True))
    for column in REQUIRED:
        if not values[column]:
            raise SettingsError(f"{where}, column {column}: is empty")
    for column, value in values.items():
        if not value.isprintable():
            raise SettingsError(f"{where}, column {column}: holds a character that cannot be shown ('{value}')")
    check_name(values["candidate"], f"{where}, column candidate")
    model, candidate, path = (values.pop(column) for column in REQUIRED)
    path = _checkpoint(path, f"{where}, column path", workdir)
    quantities = {column: _quantity(column, measured) for column in values}
    given = {column: _value(value, quantities[column], column, where) for column, value in values.items() if value}
    metrics = {metric: given.get(metric) for metric in RANGES}
    return {"model": model, "candidate": candidate, "path": path, **metrics, "given": given}


def _checkpoint(text, where, workdir):
    path = Path(absolute(text, workdir))
    if path.suffix.lower() in PICKLES:
        raise SettingsError(
            f"{where}: {text} is a pickle, which can run any code when it is loaded, so it is not; "
            f"turn it into a checkpoint folder first: coppice import-pickle {text} OUT --i-trust-this-file"
        )
    if not os.path.exists(path):  # of any text: Path.exists raises for one that is too long
        raise SettingsError(f"{where}: there is no {text} (looked at {path})")
    if not os.path.isfile(path / "config.json"):
        raise SettingsError(f"{where}: {text} is not a checkpoint folder, it has no config.json ({path})")
    try:
        check_paths([str(path), *layout.candidate_files(path)], where)
    except OSError as error:
        raise SettingsError(f"{where}: {text} cannot be read ({error})") from error
    return str(path)


def _quantity(column, measured):
    """Which of `RANGES` the values of a column are in, else its own name: of a user's own tasks no range is known."""
    if column not in measured:
        return column
    return "acc" if column in ACCURACIES else "ppl" if column.startswith("ppl.") else column


def _value(text, quantity, column, where):
    """What a cell holds: a number within the range of its `quantity` where that has one, else a number or text."""
    if quantity not in RANGES:
        return _number_or_text(text)
    low, high = RANGES[quantity]
    value = _number_or_text(text)
    if not (isinstance(value, float) and low <= value <= high):
        valid = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a finite number of at least {low:g}"
        raise SettingsError(f"{where}, column {column}: found '{text}', must be {valid} (or empty: not known)")
    return value


def _number_or_text(text):
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text
