"""A whole study traced: every pair of model and config in a line, and whether the report shows their records."""

import json
from pathlib import Path

from .. import layout
from ..errors import CoppiceError
from ..reporting import study
from . import chain, checks, showing

TABLES = ("comparisons", "tasks")


def results_of(words):
    """The results folder where `words` name a whole study (that folder, or a file of its report); else None."""
    if len(words) != 1:
        return None
    path = Path(words[0])
    for folder in (path, path.parent, path.parent.parent) if path.exists() else ():
        if (folder / layout.root("finetuned")).is_dir() and path in (
            folder,
            folder / "report",
            folder / "report" / path.name,
        ):
            return folder
    return None


def trace(results, resources, console, metric=None, stage=None, verify=False, as_json=False):
    """Print every pair of the study under `results`, with what differs; returns whether all agrees.

    metric, stage: as of `tracing.trace`: the numbers that are shown of each pair. Raises CoppiceError where there is
    no pair.
    """
    pairs, _ = study.discover(results)
    chains = [known for pair in pairs if (known := _chain(results, resources, pair))]
    if not chains:
        raise CoppiceError(f"{results}: holds no record of any model and config; run snakemake first")
    valid = sorted({name for one in chains for name in showing.known_metrics(one)})
    showing.check_metric(metric, valid)
    found = [checks.of_chain(one, verify) for one in chains]
    shown = _of_tables(Path(results) / "report", chains)
    rows = [showing.values(one, metric, stage) if metric or stage else [] for one in chains]
    if as_json:
        told = [showing.as_dict(*one) for one in zip(chains, found, map(checks.notes, chains), rows, strict=True)]
        console.file.write(json.dumps({"pairs": told, "report": [vars(check) for check in shown]}, indent=1) + "\n")
    else:
        _show(console, chains, found, rows, shown)
    return not any(check.agrees is False for each in [*found, shown] for check in each)


def _chain(results, resources, pair):
    """The Chain of a pair; None where the study has no record of this model with this config."""
    paths = layout.of_pair(results, *pair)
    own = [path for name, path in paths.items() if name != "dense"]
    return chain.of_pair(results, resources, *pair) if any(path.is_file() for path in own) else None


def _of_tables(folder, chains):
    """Whether the tables of the report in `folder` show the numbers of the comparisons."""
    try:
        shown = _shown(folder)
    except FileNotFoundError as error:
        return [checks.Check("report", None, f"{error.filename}: there is no such file; run snakemake report")]
    except (ValueError, KeyError, OSError) as error:
        words = f"{folder}: its tables cannot be read ({error}); delete them and run snakemake report"
        return [checks.Check("report", False, words)]
    return [_of_pair(folder, shown, one) for one in chains if one["comparison"].record]


def _shown(folder):
    """(model, config) -> {<metric>_<stage>: the number that the report's tables show}."""
    import pandas

    names = {"model": str, "config": str, "task": str}
    means, tasks = (pandas.read_csv(folder / f"{table}.csv", dtype=names) for table in TABLES)
    shown = {(row["model"], row["config"]): row for row in means.to_dict("records")}
    for row in tasks.to_dict("records"):
        shown[row["model"], row["config"]] |= {f"{row['task']}_{stage}": row[stage] for stage in chain.STAGES}
    return shown


def _of_pair(folder, shown, one):
    """The Check of one pair: numbers that its comparison holds and the report shows otherwise, or not at all."""
    pair, comparison = tuple(one.identity.values()), one["comparison"]
    held = {
        f"{name}_{stage}": value
        for stage in chain.STAGES
        for name, value in checks.numbers(comparison.record, stage).items()
        if value is not None
    }
    what = f"report shows the comparison of {' '.join(pair)}"
    other = [name for name, value in held.items() if not checks.near(shown.get(pair, {}).get(name), value)]
    if not other:
        return checks.Check(what, True, f"{len(held)} numbers")
    there = shown.get(pair, {}).get(other[0], "not there")
    return checks.Check(
        what, False, f"{other[0]} in the tables of {folder}: {there}; {comparison.path} holds {held[other[0]]}"
    )


def _show(console, chains, found, rows, shown):
    for one, every, numbers in zip(chains, found, rows, strict=True):
        wrong = [check for check in every if check.agrees is False]
        console.print(" ".join(one.identity.values()), style="bold", end="  ")
        console.print(showing.tally(every), style="bold red" if wrong else "")
        showing.show_values(console, numbers)
        for check in wrong:
            showing.show_check(console, check)
    for check in shown:
        if check.agrees is not True:
            showing.show_check(console, check)
    console.print(f"the report  {showing.tally(shown)}", style="bold")
    console.print("coppice trace MODEL CONFIG shows the records of one of them")
