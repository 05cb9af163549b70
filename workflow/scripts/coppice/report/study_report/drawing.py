"""What the report's figures share: who has which colour, the legend of stages, a grid with a panel a model."""

import math

from coppice.render.plotting.elements import handle
from coppice.render.plotting.style import COLOURS, FAINT, WIDTH

PANELS = 18
LABELLED = 40


def colours(study):
    """(model -> colour, legend name -> colour): by model up to six, else by family, the rest alike."""
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


def stage_handles():
    """Legend entries of the three stages, as every figure marks them."""
    return [
        handle(FAINT, "o", "pruned", hollow=True),
        handle(FAINT, "o", "fine-tuned"),
        handle(FAINT, "*", "dense"),
    ]


def panels(figure, names, x, y):
    """(axes, name) of a grid with a panel a model, three in a row; those beyond `PANELS` are said to be left out.

    `x` and `y` name the axes, below the lowest panel of each column and left of each row.
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
        figure.suptitle(f"the first {len(shown)} of {len(names)} models; the tables have all")
