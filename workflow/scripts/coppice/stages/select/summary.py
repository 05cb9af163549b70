"""Show what was chosen from what: a table of all candidates, a page (`SUMMARY.md`) and one figure per model."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.models import sparsity
from coppice.render import formatting
from coppice.render.plotting import elements, style
from coppice.stats import metrics
from coppice.study import layout

from .choice import Folders, read_candidates

if TYPE_CHECKING:
    import pandas

FIGURES = "figures"
ZEROS = "zeros"  # the column of the share of weights that single-weight pruning set to zero
INTRODUCTION = """\
Each table lists a model's candidates with the metrics that were measured for selection or given in the user's table.
Accuracies are shares of right answers (higher is better), `ppl` is perplexity (lower is better), and an empty cell was
not measured. `zeros` is the share of weights that pruning set to zero without removing them. `chosen_as` names the
configs that chose a candidate. Below each table, one line per config gives its criterion, the chosen candidate with the
value that was compared, and how far the next candidate is behind. That difference is within noise if its 95 % interval
includes 0. `candidates.tsv` holds the same tables with all digits.
"""


def summarize(
    folders_by_model: Mapping[str, Folders], selections: Iterable[PathLike], table: PathLike, page: PathLike
) -> None:
    """Write `candidates.tsv`, `SUMMARY.md` and, beside it, `figures/{model}.svg` and `.png`.

    Args:
        folders_by_model: model -> folders as for `read_candidates`.
        selections: paths of selection_info.json.
        table: path of candidates.tsv: every candidate with its metrics.
        page: path of SUMMARY.md: one table per model, the choices and their margins.
    """
    import pandas

    chosen = [records.read(path) for path in selections]
    rows = []
    for model, folders in folders_by_model.items():
        for name, entry in read_candidates(folders).items():
            configs = [info["config"] for info in chosen if (info["model"], info["candidate"]) == (model, name)]
            own = {"model": model, "candidate": name, "parameters": entry["parameters"]}
            if sparsity.is_sparse(entry["sparsity"]):
                own[ZEROS] = round(entry["sparsity"]["share"], 4)
            # `own` comes first for the order of columns, and again because a user's column may have the same name.
            rows.append(own | entry["metrics"] | own | {"chosen_as": ",".join(configs)})
    frame = pandas.DataFrame(rows)
    frame.insert(len(frame.columns) - 1, "chosen_as", frame.pop("chosen_as"))
    with records.atomic(table) as file:
        frame.to_csv(file, sep="\t", index=False)
    records.write(layout.seal_of(table), {"sha256": fingerprints.content_digest(table)})
    for model, rows in frame.groupby("model", sort=False):
        _draw(model, rows, list(dict.fromkeys(info["config"] for info in chosen)), Path(page).parent / FIGURES)
    with records.atomic(page) as file:
        file.write(_page(frame, chosen))


def _page(frame: pandas.DataFrame, chosen: Sequence[Record]) -> str:
    """Return the Markdown of SUMMARY.md."""
    lines = ["# Candidates and choices", "", INTRODUCTION, *_further_metrics(frame.columns)]
    for model, rows in frame.groupby("model", sort=False):
        shown = rows.dropna(axis="columns", how="all").drop(columns="model")
        lines += [f"## {model}", "", _markdown(shown), ""]
        own = [info for info in chosen if info["model"] == model]
        lines += [_choice(info, own) for info in own]
        up, across = metrics.axes_of(shown.columns)
        title = f"{up.heading} against {across.kind} of {model}'s candidates"
        lines += ["", f"![{title}]({FIGURES}/{quote(model)}.svg)", ""]
    return "\n".join(lines)


def _further_metrics(columns: Iterable[str]) -> list[str]:
    """Return a list of the columns that hold metrics which the introduction does not explain; [] if there are none."""
    sections = {entry.section for entry in metrics.OF_DATA}
    found = [metric for metric in map(metrics.named, columns) if metric.section in sections]
    lines = []
    for metric in found:
        ends = (
            f"from {metric.low:g} to {metric.high:g}" if math.isfinite(metric.high) else f"of at least {metric.low:g}"
        )
        lines.append(f"- `{metric.key}`: {metric.label}, a number {ends}, {metric.better}")
    return [*lines, ""] if lines else []


def _choice(info: Record, chosen: Iterable[Record]) -> str:
    """Return a line on one config's choice; `chosen` are the choices of all configs of the model."""
    words = _escaped(info["criterion"]["words"])
    parts = [f"- **{info['config']}** ({words}) chose `{info['candidate']}` with {info['value']:.4g}"]
    if info["runner_up"]:
        parts.append(formatting.margin(info["runner_up"]))
    if info["passed_over"]:
        names = ", ".join(map("`{}`".format, info["passed_over"]))
        parts.append(f"{formatting.count(len(info['passed_over']), 'candidate')} outside the bounds ({names})")
    first = next(other["config"] for other in chosen if other["candidate"] == info["candidate"])
    if first != info["config"]:
        parts.append(formatting.reused(first))
    return "; ".join(parts + [f"**note**: {warning}" for warning in info["warnings"]])


def _draw(model: str, rows: pandas.DataFrame, configs: Sequence[str], folder: Path) -> None:
    """Draw a model's candidates by the two metrics of the trade-off, or a figure that says that one is missing."""
    up, across = metrics.axes_of(rows.dropna(axis="columns", how="all").columns)
    with style.styled("candidates"):
        figure = style.new_figure()
        figure.set_size_inches(6.4, 4.6)
        measured = {up.key, across.key} <= set(rows.columns)
        shown = rows.dropna(subset=[up.key, across.key]) if measured else rows[:0]
        if shown.empty:
            missing = f"No candidate has both {up.kind} and {across.kind}."
            figure.text(0.5, 0.5, missing, ha="center", color=style.INK)
        else:
            axes = figure.subplots()
            chosen = [
                [i for i, names in enumerate(shown["chosen_as"]) if config in names.split(",")] for config in configs
            ]
            elements.candidates(axes, shown, across, up, chosen)
            elements.name(axes, across.scale * shown[across.key], up.scale * shown[up.key], shown["candidate"])
            axes.set_title(model)
            axes.set_xlabel(f"{across.brief}, {across.better}")
            axes.set_ylabel(up.with_unit(up.label))
            figure.legend(handles=elements.candidate_handles(configs), loc="outside lower center", ncols=2)
        style.save(figure, folder, model)


def _markdown(frame: pandas.DataFrame) -> str:
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    head = [_cell(name) for name in frame.columns]
    rows = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else (f"{value:.0f}" if value.is_integer() and value > 1000 else f"{value:.4g}")
    return _escaped(value).replace("|", "\\|")


def _escaped(text: object) -> str:
    """Escape HTML, which Markdown would pass on: a user's column or candidate may have any name."""
    return html.escape(str(text), quote=False)
