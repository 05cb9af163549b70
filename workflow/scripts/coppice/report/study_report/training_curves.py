"""The figures of how the results came about: candidates, training curves, cost.

Each function draws into a figure and returns None, or returns a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from coppice.render import formatting
from coppice.render.plotting import elements
from coppice.render.plotting.style import BLUE, INK, MARKERS, ORANGE, PURPLE, WIDTH
from coppice.stats import metrics

from . import drawing
from .study_records import Study

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def candidates(figure: Figure, study: Study, frames: Mapping[str, pandas.DataFrame]) -> str | None:
    """Draw every candidate of each model by two metrics, the Pareto front and the selected candidates."""
    frame = frames["candidates"]
    up, across = metrics.axes_of(frame.columns)
    names = [name for name in study.models if (frame["model"] == name).any()]
    if not names or not {up.key, across.key} <= set(frame.columns):
        return f"No candidate has both {up.kind} and {across.kind} yet."
    for axes, name in drawing.panels(figure, names, across.brief, up.with_unit(up.spoken)):
        rows = frame[frame["model"] == name].dropna(subset=[up.key, across.key])
        chosen = [
            [i for i, configs in enumerate(rows["chosen_as"]) if config in configs.split(",")]
            for config in study.configs
        ]
        elements.candidates(axes, rows, across, up, chosen)
    handles = elements.candidate_handles(study.configs)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    return None


def training(figure: Figure, study: Study, frames: Mapping[str, pandas.DataFrame]) -> str | None:
    """Draw the training and validation loss of every pair, one panel per model."""
    names = [name for name in study.models if any(pair.history for pair in study.pairs_of(name))]
    if not names:
        return "No training has finished yet."
    for axes, name in drawing.panels(figure, names, "optimizer step", "loss (nats per target token)"):
        for pair in study.pairs_of(name):
            place = study.configs.index(pair.config)
            colour, marker = elements.config_colour(place), MARKERS[place % len(MARKERS)]
            for key, style in (
                ("loss", {"alpha": 0.6, "linewidth": 1}),
                ("eval_loss", {"marker": marker, "markersize": 4}),
            ):
                steps = [(entry["step"], entry[key]) for entry in pair.history or [] if key in entry]
                if steps:
                    axes.plot(*zip(*steps, strict=True), color=colour, **style)
    handles = [
        elements.handle(
            elements.config_colour(i),
            MARKERS[i % len(MARKERS)],
            f"{c}: validation (markers), training (plain line)",
            line="-",
        )
        for i, c in enumerate(study.configs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2))
    return None


def cost(figure: Figure, study: Study, frames: Mapping[str, pandas.DataFrame]) -> str | None:
    """Draw the time of every stage, summed over its jobs, and the peak memory of each job."""
    jobs = frames["jobs"]
    if jobs.empty:
        return "No job has recorded its time and memory yet."
    stages = list(dict.fromkeys(jobs["stage"]))
    figure.set_size_inches(WIDTH, 1.3 + 0.42 * len(stages))
    left, right = figure.subplots(1, 2, sharey=True)
    totals = jobs.groupby("stage", sort=False)["seconds"].sum().reindex(stages)
    unit, scale = ("hours", 3600) if totals.max() > 7200 else ("minutes", 60)
    bars = left.barh(range(len(stages)), totals / scale, color=BLUE, height=0.6)
    numbers = jobs.groupby("stage", sort=False).size().reindex(stages)
    counts = [
        f" {total / scale:.2g} in {formatting.count(number, 'job')}"
        for total, number in zip(totals, numbers, strict=True)
    ]
    left.bar_label(bars, counts, fontsize=8, color=INK)
    left.margins(x=0.45)
    left.set_xlabel(f"time, sum over jobs ({unit})")
    left.set_yticks(range(len(stages)), stages)
    left.invert_yaxis()
    # Host and GPU memory of one job would cover each other, so each kind has its own height on the stage's row.
    for kind, colour, offset in (("host", ORANGE, -0.15), ("gpu", PURPLE, 0.15)):
        rows = jobs.dropna(subset=[kind])
        y = [stages.index(stage) + offset for stage in rows["stage"]]
        if len(rows):
            right.plot(
                rows[kind] / 2**30,
                y,
                "o",
                color=colour,
                markersize=5,
                alpha=0.7,
                label=f"{kind.replace('gpu', 'GPU')} memory",
            )
    right.set_xlim(0, 1.08 * right.get_xlim()[1])
    right.set_xlabel("peak memory of each job (GiB)")
    figure.legend(loc="outside lower center", ncols=2)
    return None
