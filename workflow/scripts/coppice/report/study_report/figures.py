"""Draw the report's figures in their order, and return them as SVG for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coppice.core.aliases import PathLike
from coppice.render.plotting import style

from . import FIGURES, sections
from .study_records import Study

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    Frames = Mapping[str, pandas.DataFrame]
    Drawer = Callable[[Figure, Study, Frames], str | None]

OF_ALL = ("training", "cost")  # figures that show all models together, however they are measured
TASKS = "task_changes"  # the figure of zero-shot tasks, which not every study measures


class Drawn(NamedTuple):
    """A figure that was drawn: the name of its files, its title and caption, and its SVG for the page."""

    file: str
    title: str
    caption: str
    svg: str


def draw(study: Study, frames: Frames, folder: PathLike) -> list[Drawn]:
    """Draw every figure of `FIGURES` into `folder` as PNG and SVG.

    In a study of several groups, there is one for each group that has something to draw: `tradeoff`, `tradeoff-2` and
    so on.
    """
    from . import plots, training_curves

    found, folder = [], Path(folder)
    for name in FIGURES:
        drawer: Drawer = getattr(plots, name, None) or getattr(training_curves, name)
        groups = [study] if name in OF_ALL else study.groups
        drawn: list[Drawn] = []
        for group in groups:
            file = f"{name}-{len(drawn) + 1}" if drawn else name
            svg = _draw(drawer, file, group, _of_group(frames, group), folder)
            drawn += [Drawn(file, *sections.caption(group, name), svg)] if svg else []
        if not drawn:  # the workflow expects the files, even of a figure that the page leaves out
            svg = _empty(drawer, name, groups[0], _of_group(frames, groups[0]), folder)
            drawn = [Drawn(name, *sections.caption(groups[0], name), svg)] if _applies(name, study) else []
        found += drawn
    files = {*FIGURES, *(one.file for one in found)}
    for stale in (path for name in FIGURES for path in folder.glob(f"{name}-*") if path.stem not in files):
        stale.unlink()
    return found


def _applies(name: str, study: Study) -> bool:
    """Return whether a figure without anything to draw may have something later."""
    return name != TASKS or not study.metrics or any(metric.mean_of for metric in study.metrics)


def _of_group(frames: Frames, group: Study) -> Frames:
    """Return the frames with the candidates of a group alone, by the metrics that some of them have."""
    if not group.is_part:
        return frames
    own = frames["candidates"]
    own = own[own["model"].isin(list(group.models))].dropna(axis="columns", how="all")
    return {**frames, "candidates": own}


def _draw(drawer: Drawer, file: str, study: Study, frames: Frames, folder: Path) -> str | None:
    """Draw a figure and return its SVG; None if there is nothing to draw."""
    with style.styled(file):
        figure = style.new_figure()
        if drawer(figure, study, frames) is not None:
            return None
        return style.for_page(style.save(figure, folder, file), file)


def _empty(drawer: Drawer, file: str, study: Study, frames: Frames, folder: Path) -> str:
    """Draw the sentence that says why there is nothing to draw."""
    with style.styled(file):
        figure = style.new_figure()
        reason = drawer(figure, study, frames)
        figure.clear()
        figure.set_size_inches(style.WIDTH, 1.2)
        figure.text(0.5, 0.5, reason, ha="center", va="center", color=style.INK, wrap=True)
        return style.for_page(style.save(figure, folder, file), file)
