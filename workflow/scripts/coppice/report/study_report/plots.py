"""The figures of what was measured: trade-off, recovered shares, changes per task, ranks, size.

Each function draws into a figure and returns None, or returns a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import Estimate, Record
from coppice.render import formatting
from coppice.render.plotting import elements
from coppice.render.plotting.style import FAINT, MARKERS, PAPER, WIDTH
from coppice.stats.metrics import AVERAGE, Metric

from . import drawing, speeds
from .drawing import LABELLED
from .study_records import Pair, Study

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST_RANKS = 4  # of three pairs, one order in six agrees with another by chance
TITLE = 26  # characters in a line of the title of one of three panels
# Pale enough for the black numbers in the cells, whether the page is light or dark
VERDICT_COLOURS = {"worse": "#f1a35f", "no clear change": "#e3e4e6", "better": "#7fb2d9"}
Points = dict[str, tuple[float, float]]  # stage -> (x, y)
Reader = Callable[[Pair, str], float | None]  # of a pair and a stage
Ranked = tuple[Pair, float, float]  # a pair, its rank before and its rank after fine-tuning


def tradeoff(figure: Figure, study: Study, frames: Mapping[str, pandas.DataFrame]) -> str | None:
    """Draw the leading metric against others, with an arrow from each pruned model to its fine-tuned version."""
    up, first = study.axes
    others = study.beside[:2]
    pairs = [pair for pair in study.pairs if any(_points(pair, metric, up) for metric in others)]
    if not pairs:
        return f"No pair has both {up.kind} and {first.kind} yet."
    figure.set_size_inches(WIDTH, 4.6)
    colour, kinds = drawing.colours(study)
    shape = {config: MARKERS[place % len(MARKERS)] for place, config in enumerate(study.configs)}
    panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
    for axes, across in zip(panels, others, strict=True):
        groups = {}
        for pair in pairs:
            groups.setdefault((colour[pair.model], shape[pair.config]), []).append(_points(pair, across, up))
        for (shade, marker), points in groups.items():
            _stages(axes, points, shade, marker)
            _moves(axes, points, shade, heads=len(pairs) <= LABELLED)
        values = [x for pair in pairs for x, _ in _points(pair, across, up).values()]
        # a linear axis would squeeze low perplexities together
        if across.log and values and max(values) > 4 * min(values):
            elements.log(axes.xaxis, axes.set_xscale)
        axes.set_xlabel(f"{across.with_unit(across.label)} ({across.better})")
    panels[0].set_ylabel(up.with_unit(up.label))
    handles = [elements.handle(c, "o", name) for name, c in kinds.items()]
    handles += [elements.handle(FAINT, shape[config], config) for config in study.configs]
    handles += drawing.stage_handles()
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return None


def _points(pair: Pair, across: Metric, up: Metric) -> Points:
    """Return stage -> (x, y), two metrics in their units, for the stages that have both."""
    values = {stage: (x, pair.values(up)[stage]) for stage, x in pair.values(across).items()}
    return {stage: (across.scale * x, up.scale * y) for stage, (x, y) in values.items() if None not in (x, y)}


def _stages(axes: Axes, points: Sequence[Points], colour: str, marker: str) -> None:
    """Draw the points of pairs with one color and marker: stars for dense, hollow for pruned, filled for fine-tuned."""
    for stage, shape, face, size in (
        ("dense", "*", colour, 9),
        ("pruned", marker, "none", 6),
        ("finetuned", marker, colour, 6),
    ):
        drawn = [stages[stage] for stages in points if stage in stages]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), shape, color=colour, markerfacecolor=face, markersize=size)


def _moves(axes: Axes, points: Sequence[Points], colour: str, heads: bool) -> None:
    """Connect each pruned point with its fine-tuned one: by arrows, or without `heads` by plain lines."""
    from matplotlib.collections import LineCollection

    ways = [(stages["pruned"], stages["finetuned"]) for stages in points if {"pruned", "finetuned"} <= stages.keys()]
    if not heads:  # one collection draws hundreds of lines much faster than as many annotations
        axes.add_collection(LineCollection(ways, color=colour, alpha=0.4, linewidth=0.8))
        return
    for start, end in ways:
        arrow = {"arrowstyle": "->", "color": colour, "alpha": 0.7, "shrinkA": 4, "shrinkB": 4}
        axes.annotate("", xy=end, xytext=start, arrowprops=arrow)


def recovered(figure: Figure, study: Study, frames: Mapping[str, pandas.DataFrame]) -> str | None:
    """Draw the recovered share of each pair with its interval, by up to three metrics."""
    metrics = study.ranked_metrics[:3]
    pairs = [pair for pair in study.compared if any(_recovered(pair, metric) for metric in metrics)]
    metrics = [metric for metric in metrics if any(_recovered(pair, metric) for pair in pairs)]
    if not pairs:
        return "No pair has a recovered share yet."
    names = list(dict.fromkeys(pair.model for pair in pairs))
    configs = study.configs
    figure.set_size_inches(WIDTH, 1.8 + len(names) * (0.12 + 0.17 * len(configs)))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for place, config in enumerate(configs):
            parts = [(pair, _recovered(pair, metric)) for pair in pairs if pair.config == config]
            rows = [(names.index(pair.model), part) for pair, part in parts if part]
            _intervals(axes, rows, place, len(configs))
        axes.axvline(0, color=FAINT, linewidth=1)
        axes.axvline(100, color=FAINT, linewidth=1, linestyle="--")
        # One pair with a tiny loss can have an enormous share; limits keep the others readable.
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -150), min(high, 250))
        axes.set_title(textwrap.fill(metric.label, TITLE))
        axes.set_xlabel("% of what pruning lost")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # the first model on top
    handles = [
        elements.handle(elements.config_colour(i), MARKERS[i % len(MARKERS)], config)
        for i, config in enumerate(configs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return None


def _recovered(pair: Pair, metric: Metric) -> Estimate | None:
    """Return {value, interval, note} of a pair's recovered share, or None if it is undefined."""
    part = (pair.measured(metric) or {}).get("recovered") or {}
    return part if part.get("value") is not None else None


def _intervals(axes: Axes, rows: Sequence[tuple[int, Estimate]], place: int, count: int) -> None:
    """Draw the recovered shares of one config; rows: [(row, {value, interval})], where an interval may be None."""
    values = [100 * part["value"] for _, part in rows]
    bounds = [[100 * bound for bound in part["interval"] or (part["value"],) * 2] for _, part in rows]
    # A percentile interval need not contain the value itself, and matplotlib rejects negative error bars.
    errors = [[max(v - low, 0), max(high - v, 0)] for v, (low, high) in zip(values, bounds, strict=True)]
    y = [row + (place - (count - 1) / 2) * 0.6 / count for row, _ in rows]
    if rows:
        marker = MARKERS[place % len(MARKERS)]
        sides = list(zip(*errors, strict=True))
        axes.errorbar(
            values, y, xerr=sides, fmt=marker, color=elements.config_colour(place), markersize=5, linewidth=1.5
        )


def task_changes(figure: Figure, study: Study, frames: Mapping[str, pandas.DataFrame]) -> str | None:
    """Draw the verdict on every task in every pair as a heat map, with the change in percentage points in its cells."""
    import numpy
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names, pairs = study.task_names, [pair for pair in study.compared if pair.tasks]
    if not pairs:
        return "No zero-shot task has been compared yet."
    columns = [*names, "mean"]
    parts = [[*map(pair.tasks.get, names), pair.measured(AVERAGE)] for pair in pairs]
    verdicts = list(VERDICT_COLOURS)
    cells = numpy.array(
        [[numpy.nan if part is None else verdicts.index(part["verdict"]) for part in row] for row in parts]
    )
    labelled = len(pairs) <= LABELLED
    figure.set_size_inches(WIDTH, 1.5 + (0.28 if labelled else 0.14) * len(pairs))
    axes = figure.subplots()
    colours = ListedColormap(list(VERDICT_COLOURS.values()))
    edges = {"edgecolors": PAPER, "linewidth": 1.0} if labelled else {"edgecolors": "none", "rasterized": True}
    axes.pcolormesh(cells, cmap=colours, vmin=-0.5, vmax=len(verdicts) - 0.5, **edges)
    axes.invert_yaxis()
    axes.set_xticks(
        [place + 0.5 for place in range(len(columns))], columns, rotation=30, ha="left", rotation_mode="anchor"
    )
    axes.xaxis.tick_top()
    names = [f"{pair.model} / {pair.config}" for pair in pairs]
    axes.set_yticks([row + 0.5 for row in range(len(pairs))], names, fontsize=9 if labelled else 6)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if labelled:
        for row, column in numpy.ndindex(*cells.shape):
            _cell(axes, row, column, parts[row][column])
    handles = [Patch(facecolor=colour, label=verdict) for verdict, colour in VERDICT_COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return None


def _cell(axes: Axes, row: int, column: int, part: Record | None) -> None:
    """Write a change into its cell of the heat map, with a star if it is clear."""
    place = {"ha": "center", "va": "center"}
    if part is None:
        axes.text(column + 0.5, row + 0.5, "–", color=FAINT, **place)
        return
    star = "" if part["verdict"] == "no clear change" else "*"
    text = f"{AVERAGE.scale * part['change']['value']:+.1f}{star}"
    # The colors of the cells are those of paper in the light, whatever the page's are
    axes.text(column + 0.5, row + 0.5, text, color="#000000", fontsize=7.5, **place)


def ranks(figure: Figure, study: Study, frames: Mapping[str, pandas.DataFrame]) -> str | None:
    """Draw the rank of the pairs before and after fine-tuning, with Kendall's tau between the two orders."""
    metrics = [(metric, _ranked(study, metric)) for metric in study.ranked_metrics[:2]]
    metrics = [(metric, ranked) for metric, ranked in metrics if len(ranked) > 1]
    if not metrics:
        return "Fewer than two pairs were measured before and after fine-tuning."
    count = max(len(ranked) for _, ranked in metrics)
    labelled = count <= LABELLED
    figure.set_size_inches(WIDTH, 1.6 + 0.24 * count if labelled else 5.0)
    for axes, (metric, ranked) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        before, after = zip(*((b, a) for _, b, a in ranked), strict=True)
        axes.set_title("\n".join([metric.label, *_rank_correlation(before, after)]))
        (_slopes if labelled else _rank_scatter)(axes, study, ranked)
        axes.invert_yaxis()
    handles = [
        elements.handle(elements.config_colour(i), MARKERS[i % len(MARKERS)], c) for i, c in enumerate(study.configs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return None


def _rank_correlation(before: Sequence[float], after: Sequence[float]) -> list[str]:
    """Return [Kendall's tau of two rankings with its p-value], or [] if there are too few for it to mean anything."""
    from scipy.stats import kendalltau

    found = kendalltau(before, after) if len(before) >= FEWEST_RANKS else None
    if found is None or math.isnan(found.statistic):
        return []
    p = "" if math.isnan(found.pvalue) else f", {formatting.probability(found.pvalue)}"
    return [f"Kendall's tau {found.statistic:.2f}{p}"]


def _slopes(axes: Axes, study: Study, ranked: Sequence[Ranked]) -> None:
    """Draw a line per pair from its rank before to its rank after; tied pairs are stacked and share one number."""
    from scipy.stats import rankdata

    places = [rankdata([row[side] for row in ranked], method="ordinal") for side in (1, 2)]
    for (pair, *_), before, after in zip(ranked, *places, strict=True):
        place = study.configs.index(pair.config)
        marker = MARKERS[place % len(MARKERS)]
        axes.plot([0, 1], [before, after], marker=marker, color=elements.config_colour(place), markersize=5)
    axes.set_xticks([0, 1], ["pruned", "fine-tuned"])
    axes.set_xlim(-0.1, 1.1)
    axes.set_yticks(places[0], [f"{pair.model} / {pair.config}  {rank:g}" for pair, rank, _ in ranked], fontsize=7.5)
    axes.set_ylabel("rank before fine-tuning")
    axes.grid(axis="y", visible=False)


def _rank_scatter(axes: Axes, study: Study, ranked: Sequence[Ranked]) -> None:
    """Draw the rank after against the rank before, for studies with too many pairs to name each."""
    for place, config in enumerate(study.configs):
        points = [(before, after) for pair, before, after in ranked if pair.config == config]
        if points:
            marker = MARKERS[place % len(MARKERS)]
            axes.plot(*zip(*points, strict=True), marker, color=elements.config_colour(place), markersize=5)
    axes.set_xlabel("rank before fine-tuning")
    axes.set_ylabel("rank after fine-tuning")


def _ranked(study: Study, metric: Metric) -> list[Ranked]:
    """Return [(pair, rank before, rank after)] of the pairs measured at both stages; rank 1 is the best."""
    from scipy.stats import rankdata

    values = [(pair, pair.values(metric)) for pair in study.pairs]
    values = [(pair, v["pruned"], v["finetuned"]) for pair, v in values if None not in (v["pruned"], v["finetuned"])]
    sign = -1 if metric.higher_is_better else 1
    if not values:
        return []
    before, after = (rankdata([sign * row[place] for row in values]) for place in (1, 2))
    return [(row[0], float(b), float(a)) for row, b, a in zip(values, before, after, strict=True)]


def size(figure: Figure, study: Study, frames: Mapping[str, pandas.DataFrame]) -> str | None:
    """Draw the leading metric against the number of parameters, and against latency if it differs clearly."""
    panels: list[tuple[str, Reader]] = [("parameters (millions)", _millions)]
    if any(map(speeds.of_pair, study.pairs)):
        panels.append(("measured latency (ms per new token)", _latency))
    up, _ = study.axes
    rows = [pair for pair in study.pairs if pair.values(up)["pruned"] is not None]
    if not rows:
        return f"No {up.kind} has been measured yet."
    colour, kinds = drawing.colours(study)
    for axes, (label, read) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        groups = {}
        for pair in rows:
            places = {stage: (read(pair, stage), value) for stage, value in pair.values(up).items()}
            points = {stage: (x, up.scale * y) for stage, (x, y) in places.items() if None not in (x, y)}
            marker = MARKERS[study.configs.index(pair.config) % len(MARKERS)]
            groups.setdefault((colour[pair.model], marker), []).append(points)
        for (shade, marker), group in groups.items():
            _stages(axes, group, shade, marker)
        axes.set_xlabel(label)
        axes.set_ylabel(up.with_unit(up.label))
    handles = [elements.handle(c, "o", name) for name, c in kinds.items()]
    handles += [elements.handle(FAINT, MARKERS[i % len(MARKERS)], c) for i, c in enumerate(study.configs)]
    handles += drawing.stage_handles()
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return None


def _millions(pair: Pair, stage: str) -> float | None:
    count = (getattr(pair, stage) or {}).get("parameters")
    return None if count is None else count / 1e6


def _latency(pair: Pair, stage: str) -> float | None:
    return (speeds.of_pair(pair) or {}).get(stage)
