"""What was chosen from what, for people: the table of all candidates, a page, and a figure a model."""

import html
import math
from pathlib import Path
from urllib.parse import quote

from coppice.core import fingerprints, records
from coppice.render import formatting
from coppice.render.plotting import elements, style
from coppice.stats import pareto
from coppice.study import layout

from .choice import read_candidates

FIGURES = "figures"


def summarize(folders_by_model, selections, table, page):
    """Write `candidates.tsv` (every candidate with its metrics), `SUMMARY.md` (a table a model, what was chosen, by
    what margin) and beside it `figures/{model}.svg` and `.png`.

    folders_by_model: model -> folders as for `read_candidates`; selections: paths of selection_info.json.
    """
    import pandas

    chosen = [records.read(path) for path in selections]
    rows = []
    for model, folders in folders_by_model.items():
        for name, entry in read_candidates(folders).items():
            configs = [info["config"] for info in chosen if (info["model"], info["candidate"]) == (model, name)]
            known = {"model": model, "candidate": name, "parameters": entry["parameters"]}
            # a column of a user's table that is called like one of these is not what was found here
            rows.append(known | entry["metrics"] | known | {"chosen_as": ",".join(configs)})
    frame = pandas.DataFrame(rows)
    frame.insert(len(frame.columns) - 1, "chosen_as", frame.pop("chosen_as"))
    with records.atomic(table) as file:
        frame.to_csv(file, sep="\t", index=False)
    records.write(layout.seal_of(table), {"sha256": fingerprints.content_digest(table)})
    for model, rows in frame.groupby("model", sort=False):
        _draw(model, rows, list(dict.fromkeys(info["config"] for info in chosen)), Path(page).parent / FIGURES)
    with records.atomic(page) as file:
        file.write(_page(frame, chosen))


def _page(frame, chosen):
    """The Markdown of SUMMARY.md."""
    lines = ["# Candidates and choices", ""]
    for model, rows in frame.groupby("model", sort=False):
        shown = rows.dropna(axis="columns", how="all").drop(columns="model")
        lines += [f"## {model}", "", _markdown(shown), ""]
        own = [info for info in chosen if info["model"] == model]
        lines += [_choice(info, own) for info in own]
        lines += ["", f"![accuracy against perplexity of {model}'s candidates]({FIGURES}/{quote(model)}.svg)", ""]
    return "\n".join(lines)


def _choice(info, chosen):
    """A line on one config's choice; `chosen` are those of all configs of the model."""
    words = _escaped(info["criterion"]["words"])
    lines = [f"- **{info['config']}** ({words}): `{info['candidate']}` with {info['value']:.4g}"]
    if info["runner_up"]:
        lines.append(formatting.margin(info["runner_up"]))
    if info["passed_over"]:
        lines.append(f"{len(info['passed_over'])} passed over ({', '.join(map('`{}`'.format, info['passed_over']))})")
    first = next(other["config"] for other in chosen if other["candidate"] == info["candidate"])
    if first != info["config"]:
        lines.append(formatting.reused(first))
    return "; ".join(lines + [f"**note**: {warning}" for warning in info["warnings"]])


def _draw(model, rows, configs, folder):
    """Accuracy against perplexity of a model's candidates; where there are not both, a figure that says so."""
    accuracy, perplexity = pareto.axes_of(rows.columns)
    with style.styled("candidates"):
        figure = style.new_figure()
        figure.set_size_inches(6.4, 4.6)
        known = rows.dropna(subset=[accuracy, perplexity]) if accuracy and perplexity else rows[:0]
        if known.empty:
            figure.text(0.5, 0.5, "No candidate has both accuracy and perplexity.", ha="center", color=style.INK)
        else:
            axes = figure.subplots()
            chosen = [
                [i for i, names in enumerate(known["chosen_as"]) if config in names.split(",")] for config in configs
            ]
            elements.candidates(axes, known[perplexity].tolist(), (100 * known[accuracy]).tolist(), chosen)
            elements.name(axes, known[perplexity], 100 * known[accuracy], known["candidate"])
            axes.set_title(model)
            axes.set_xlabel(f"perplexity ({perplexity.removeprefix('ppl.')}), lower is better")
            axes.set_ylabel("mean zero-shot accuracy (%)")
            figure.legend(handles=elements.candidate_handles(configs), loc="outside lower center", ncols=2)
        style.save(figure, folder, model)


def _markdown(frame):
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    head = [_cell(name) for name in frame.columns]
    rows = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value):
    if isinstance(value, float):
        return "" if math.isnan(value) else (f"{value:.0f}" if value.is_integer() and value > 1000 else f"{value:.4g}")
    return _escaped(value).replace("|", "\\|")


def _escaped(text):
    """As Markdown shows it: columns of a user's table may be called anything, and Markdown may hold HTML."""
    return html.escape(str(text), quote=False)
