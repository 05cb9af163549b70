"""Draw elements that several figures share: legend entries, log axes with plain numbers, a plot of candidates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from coppice.stats import pareto
from coppice.stats.metrics import Metric

from .style import BLUE, FAINT, GREEN, MARKERS, ORANGE, PURPLE

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.lines import Line2D
    from matplotlib.typing import LineStyleType


def config_colour(place: int) -> str:
    """Return the color of the config at `place`."""
    return (BLUE, ORANGE, GREEN, PURPLE)[place % 4]


def handle(colour: str, marker: str, label: str, hollow: bool = False, line: LineStyleType = "") -> Line2D:
    """Return a legend entry: a marker, with a line through it if `line` is a line style."""
    from matplotlib.lines import Line2D

    face = "none" if hollow else colour
    return Line2D([], [], color=colour, marker=marker, linestyle=line, markerfacecolor=face, label=label)


def log(axis: Axis, set_scale: Callable[[str], object]) -> None:
    """Make an axis logarithmic, with plain numbers as labels."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter("")


def config_marker(place: int) -> str:
    """Return the marker of the config at `place`."""
    return MARKERS[place % len(MARKERS)]


def candidates(axes: Axes, rows: pandas.DataFrame, across: Metric, up: Metric, chosen: Sequence[Sequence[int]]) -> None:
    """Draw candidates as points, their Pareto front as a line, and a marker for each config around those it chose.

    Args:
        axes: of a matplotlib figure.
        rows: a frame with a column for each of the two metrics.
        across: the metric on the horizontal axis.
        up: the metric on the vertical axis.
        chosen: for each config, in order, the indices of the candidates it chose.
    """
    x, y = ((metric.scale * rows[metric.key]).tolist() for metric in (across, up))
    axes.plot(x, y, "o", color=FAINT, markersize=5)
    high = y if up.higher_is_better else [-value for value in y]
    low = [-value for value in x] if across.higher_is_better else x
    front = sorted((a, b) for a, b, on in zip(x, y, pareto.pareto(high, low), strict=True) if on)
    if front:
        axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=1)
    for place, picks in enumerate(chosen):
        axes.plot(
            [x[i] for i in picks],
            [y[i] for i in picks],
            config_marker(place),
            color=config_colour(place),
            markersize=min(9 + 3 * place, 18),
            clip_on=False,
            markerfacecolor="none",
            markeredgewidth=1.8,
        )
    axes.margins(0.12)


def name(axes: Axes, x: Iterable[float], y: Iterable[float], names: Collection[str], most: int = 12) -> None:
    """Write each point's name beside it, on the side with more room; write none if there are more than `most`."""
    if len(names) > most:
        return
    middle = sum(axes.get_xlim()) / 2
    for place, text in zip(zip(x, y, strict=True), names, strict=True):
        left = place[0] > middle
        axes.annotate(
            text,
            place,
            # a front rises to the right: the label goes above it in the right half, below it in the left half
            xytext=(-9, 5) if left else (9, -11),
            textcoords="offset points",
            ha="right" if left else "left",
            color=FAINT,
            fontsize=7.5,
        )


def candidate_handles(configs: Iterable[str]) -> list[Line2D]:
    """Return the legend entries for what `candidates` draws."""
    handles = [handle(FAINT, "o", "candidate (line: Pareto front)")]
    for place, config in enumerate(configs):
        handles.append(handle(config_colour(place), config_marker(place), f"chosen by {config}", hollow=True))
    return handles
