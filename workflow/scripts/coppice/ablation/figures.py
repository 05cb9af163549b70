"""Draw the figures of an ablation: quality against size and time, and the learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike
from coppice.render.plotting import elements, style
from coppice.render.plotting.style import COLOURS, FAINT, MARKERS, WIDTH
from coppice.stats import pareto
from coppice.stats.metrics import LOSS, Metric

from . import formats
from .reading import Arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

FIGURES = ("pareto", "curves")
CAPTIONS = {
    "pareto": (
        "Quality, size and time",
        "Each arm by its trained parameters (left) and its training time (right). The line joins the arms that no "
        "other arm beats in both quality and cost.",
    ),
    "curves": ("Learning curves", "Validation loss by step, mean over seeds. The thin line is the training loss."),
}


def draw(found: Sequence[Arm], metrics: Sequence[tuple[Metric, str]], folder: PathLike) -> dict[str, str]:
    """Draw the figures of the trained arms into `folder`; return name -> SVG text for the page.

    metrics: (metric, part) of each row of the first figure.
    """
    inline = {}
    for name, drawer in (("pareto", _pareto), ("curves", _curves)):
        with style.styled(name):
            figure = style.new_figure()
            if found:
                drawer(figure, found, metrics)
            else:
                figure.text(0.5, 0.5, "No arm was trained to the end.", ha="center", color=style.INK)
            inline[name] = style.for_page(style.save(figure, folder, name), name)
    return inline


def _looks(found: Sequence[Arm]) -> dict[str, tuple[str, str]]:
    """Return arm -> (color, marker), different for the first 42 arms."""
    # seven markers with six colors: with equal numbers, each color would always have the same marker
    markers = MARKERS[: len(COLOURS) + 1]
    return {arm.name: (COLOURS[place % len(COLOURS)], markers[place % len(markers)]) for place, arm in enumerate(found)}


def _pareto(figure: Figure, found: Sequence[Arm], metrics: Sequence[tuple[Metric, str]]) -> None:
    figure.set_size_inches(WIDTH, 1.2 + 2.6 * len(metrics))
    panels = figure.subplots(len(metrics), 2, sharey="row", squeeze=False)
    looks = _looks(found)
    for row, (metric, part) in zip(panels, metrics, strict=True):
        shown = [arm for arm in found if metric.key == LOSS.key or arm.measured(part)]
        y = [metric.scale * arm.value(metric, part) for arm in shown]
        sizes = [arm.first["trainable_parameters"] for arm in shown]
        times = [sum(run["seconds"] for run in arm.runs.values()) / len(arm.runs) for arm in shown]
        for axes, x, title in ((row[0], sizes, "trained parameters"), (row[1], times, "training time (s)")):
            _pareto_line(axes, x, y, metric.higher_is_better)
            for arm, across, up in zip(shown, x, y, strict=True):
                colour, marker = looks[arm.name]
                axes.plot(across, up, marker, color=colour, markersize=6)
            axes.set_xlabel(title)
            axes.margins(0.12)
        _sizes(row[0], sizes)
        row[0].set_ylabel(metric.with_unit(formats.label(metric, part)))
    _legend(figure, found, looks)


def _sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """Format the axis of trained parameters (20 k, 5 M); it is logarithmic if they differ by more than 4 times."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if max(sizes) > 4 * min(sizes):
        elements.log(axes.xaxis, axes.set_xscale)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter())


def _pareto_line(axes: Axes, x: Sequence[float], y: Sequence[float], higher_is_better: bool) -> None:
    """Draw the line through the Pareto-optimal points."""
    best = pareto.pareto([value if higher_is_better else -value for value in y], x)
    points = sorted((a, b) for a, b, on in zip(x, y, best, strict=True) if on)
    axes.plot(*zip(*points, strict=True), color=FAINT, linewidth=1)


def _curves(figure: Figure, found: Sequence[Arm], metrics: Sequence[tuple[Metric, str]]) -> None:
    figure.set_size_inches(WIDTH, 4.4)
    axes, looks = figure.subplots(), _looks(found)
    for arm in found:
        colour, marker = looks[arm.name]
        training, validation = _mean_curve(arm, "loss"), _mean_curve(arm, "eval_loss")
        axes.plot(*training, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(*validation, color=colour, marker=marker, markersize=4, linewidth=1.5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token (nats)")
    _legend(figure, found, looks)


def _mean_curve(arm: Arm, key: str) -> tuple[list[int], ArrayLike]:
    """Return (steps, means over seeds) of a loss, at the steps of the first seed."""
    # with a budget of tokens the seeds take different numbers of steps, so the others are interpolated
    import numpy

    runs = [[(entry["step"], entry[key]) for entry in run["history"] if key in entry] for run in arm.runs.values()]
    if not all(runs):
        return [], []
    steps = [step for step, _ in runs[0]]
    return steps, numpy.mean([numpy.interp(steps, *zip(*run, strict=True)) for run in runs], axis=0)


def _legend(figure: Figure, found: Sequence[Arm], looks: Mapping[str, tuple[str, str]]) -> None:
    handles = [elements.handle(*looks[arm.name], arm.name) for arm in found]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), fontsize=8)
