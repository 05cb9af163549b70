"""What the report's figures share: the colors of models, the legend of stages, a grid with one panel per model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from coppice.render.plotting.elements import handle
from coppice.render.plotting.style import COLOURS, FAINT, WIDTH

from .study_records import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PANELS = 18  # models that a grid of panels shows
LABELLED = 40  # pairs up to which a figure labels each one


def colours(study: Study) -> tuple[dict[str, str], dict[str, str]]:
    """Return (model -> color, legend entry -> color).

    Each model has its own color if there are enough, else each family. Families beyond the last color share one.
    """
    names = list(study.models)
    if len(names) <= len(COLOURS):
        colours = dict(zip(names, COLOURS, strict=False))
        return colours, colours
    families = list(dict.fromkeys(study.models[name]["family"] or "other" for name in names))
    kinds = {family: COLOURS[i] if i < len(COLOURS) else FAINT for i, family in enumerate(families)}
    if len(families) > len(COLOURS):
        legend = dict(list(kinds.items())[: len(COLOURS)]) | {"other families": FAINT}
        return {name: kinds[study.models[name]["family"] or "other"] for name in names}, legend
    return {name: kinds[study.models[name]["family"] or "other"] for name in names}, kinds


def stage_handles() -> list[Line2D]:
    """Return the legend entries of the three stages, which look the same in every figure."""
    return [
        handle(FAINT, "o", "pruned", hollow=True),
        handle(FAINT, "o", "fine-tuned"),
        handle(FAINT, "*", "dense"),
    ]


def panels(figure: Figure, names: Sequence[str], x: str, y: str) -> Iterator[tuple[Axes, str]]:
    """Yield (axes, name) for a grid with one panel per model, three in a row.

    If there are more than `PANELS` models, the figure's title says how many of them it shows.

    Args:
        figure: a matplotlib figure; its size is set to fit the grid.
        names: the models.
        x: label of the horizontal axes, shown below the lowest panel of each column.
        y: label of the vertical axes, shown left of each row.
    """
    shown = names[:PANELS]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure.set_size_inches(WIDTH, 1.1 + 2.1 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, (axes, name) in enumerate(zip(grid, shown, strict=False)):
        axes.set_title(name)
        if place % columns == 0:
            axes.set_ylabel(y)
        if place + columns >= len(shown):
            axes.set_xlabel(x)
        yield axes, name
    for axes in grid[len(shown) :]:
        axes.remove()
    if len(names) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(names)} models; the tables list all of them")
