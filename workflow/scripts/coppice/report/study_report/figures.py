"""Draw the report's figures in their order, and return them as SVG for the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike
from coppice.render.plotting import style

from . import FIGURES
from .study_records import Study

if TYPE_CHECKING:
    import pandas


def draw(study: Study, frames: Mapping[str, pandas.DataFrame], folder: PathLike) -> dict[str, str]:
    """Draw every figure of `FIGURES` into `folder` as PNG and SVG.

    Returns:
        name -> SVG text for the page.
    """
    from . import plots, training_curves

    drawers = {name: getattr(plots, name, None) or getattr(training_curves, name) for name in FIGURES}
    inline = {}
    for name in FIGURES:
        with style.styled(name):
            figure = style.new_figure()
            reason = drawers[name](figure, study, frames)
            if reason is not None:  # nothing to draw: the figure shows the sentence that says why
                figure.clear()
                figure.set_size_inches(style.WIDTH, 1.2)
                figure.text(0.5, 0.5, reason, ha="center", va="center", color=style.INK, wrap=True)
            inline[name] = style.for_page(style.save(figure, Path(folder), name), name)
    return inline
