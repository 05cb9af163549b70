"""Trace a whole study: one line per model and config, and whether the report's tables match the records."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CoppiceError
from coppice.study import layout

from ..study_report import csv_tables, study_records
from . import agreement, chain, display

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

TABLES = ("comparisons", "tasks", "candidates")


def trace(
    results: PathLike,
    resources: PathLike,
    console: Console,
    metric: str | None = None,
    stage: str | None = None,
    verify: bool = False,
    as_json: bool = False,
) -> bool:
    """Print the checks of every pair of the study under `results`, naming those that fail.

    For the arguments see `provenance.trace`; the numbers of each pair are shown only with `metric` or `stage`.

    Returns:
        False if any check fails, else True.

    Raises:
        CoppiceError: if the study has no record of any pair.
    """
    pairs, _ = study_records.discover(results)
    chains = [found for pair in pairs if (found := _chain(results, resources, pair))]
    if not chains:
        raise CoppiceError(f"{results}: there is no record of any model and config; run snakemake first")
    valid = sorted({name for one in chains for name in display.known_metrics(one)})
    display.check_metric(metric, valid)
    found = [agreement.of_chain(one, verify) for one in chains]
    shown = _of_tables(Path(results), chains)
    rows = [display.values(one, metric, stage) if metric or stage else [] for one in chains]
    if as_json:
        every = zip(chains, found, map(agreement.notes, chains), rows, strict=True)
        content = [display.as_dict(*one) for one in every]
        console.file.write(json.dumps({"pairs": content, "report": [vars(check) for check in shown]}, indent=1) + "\n")
    else:
        _show(console, chains, found, rows, shown)
    return not any(check.agrees is False for each in [*found, shown] for check in each)


def _chain(results: PathLike, resources: PathLike, pair: tuple[str, str]) -> chain.Chain | None:
    """Return the `Chain` of a pair, or None if the study has no record of this model with this config."""
    paths = layout.of_pair(results, *pair)
    own = [path for name, path in paths.items() if name != "dense"]
    return chain.of_pair(results, resources, *pair) if any(path.is_file() for path in own) else None


def _of_tables(results: Path, chains: Sequence[chain.Chain]) -> list[agreement.Check]:
    """Check that the report's tables show what the records hold now, and that they list every compared pair."""
    folder = results / layout.REPORT
    try:
        shown = [_read(folder / f"{name}.csv") for name in TABLES]
        names = shown[0][["model", "family", "variant"]].drop_duplicates("model").set_index("model")
        pairs = list(shown[0][["model", "config"]].itertuples(index=False, name=None))
    except FileNotFoundError as error:
        return [agreement.Check("report", None, f"{error.filename}: there is no such file; run snakemake report")]
    except (ValueError, KeyError, OSError) as error:
        detail = f"{folder}: its tables cannot be read ({error}); delete them and run snakemake report"
        return [agreement.Check("report", False, detail)]
    # Variants and families come from the report's own table: the configuration is not at hand.
    study = study_records.read(results, pairs, {name: dict(facts) for name, facts in names.iterrows()})
    found = [_of_table(folder, name, table, study) for name, table in zip(TABLES, shown, strict=True) if pairs]
    compared = [tuple(one.identity.values()) for one in chains if one["comparison"].record]
    absent = [" ".join(pair) for pair in compared if pair not in pairs]
    if absent:
        detail = f"{folder} lacks {', '.join(absent)}; only.models or only.configs may exclude them"
        found.append(agreement.Check("report", None, detail))
    return found


def _read(source: PathLike | TextIO) -> pandas.DataFrame:
    import pandas

    return pandas.read_csv(source, dtype=str, keep_default_na=False)


def _value(cell: str) -> str | float:
    """Return a cell as a number if it is one: pandas writes 1 or 1.0 depending on the rest of the column."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    return number if math.isfinite(number) else cell  # a model may be called nan


def _of_table(folder: Path, name: str, shown: pandas.DataFrame, study: study_records.Study) -> agreement.Check:
    """Return the `Check` that every cell of a table matches the records, except for the state of the jobs."""
    path, what = folder / f"{name}.csv", f"the report's {name} match the records"
    given = _read(io.StringIO(getattr(csv_tables, name)(study).to_csv(index=False)))
    if list(given) != list(shown) or len(given) != len(shown):
        return agreement.Check(
            what, False, f"{path} has other rows or columns than the records give; run snakemake report"
        )
    every = [column for column in shown if column != "state"]
    differs = shown[every].map(_value) != given[every].map(_value)
    if not differs.any(axis=None):
        return agreement.Check(what, True, f"{len(shown)} rows")
    row, column = differs.stack().idxmax()
    where = " ".join(shown.loc[row, key] for key in ("model", "config", "candidate", "task") if key in shown)
    detail = (
        f"{path}: {column} of {where} is {shown.loc[row, column] or 'empty'}, but the records give "
        f"{given.loc[row, column] or 'nothing'}"
    )
    return agreement.Check(what, False, detail)


def _show(
    console: Console,
    chains: Sequence[chain.Chain],
    found: Sequence[Sequence[agreement.Check]],
    rows: Sequence[Sequence[Record]],
    shown: Sequence[agreement.Check],
) -> None:
    for one, every, numbers in zip(chains, found, rows, strict=True):
        wrong = [check for check in every if check.agrees is False]
        console.print(" ".join(one.identity.values()), style="bold", end="  ")
        console.print(display.tally(every), style="bold red" if wrong else "")
        display.show_values(console, numbers)
        for check in wrong:
            display.show_check(console, check)
    for check in shown:
        if check.agrees is not True:
            display.show_check(console, check)
    console.print(f"the report  {display.tally(shown)}", style="bold")
    console.print("For the records of one pair, run coppice trace with its comparison_report.txt.")
