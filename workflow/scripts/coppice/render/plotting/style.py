"""Define how every figure looks, and write figures as PNG and SVG.

The colors are those of Okabe & Ito, which readers with any color vision can distinguish. Color never carries a meaning
alone: shapes and labels repeat it. Ink and paper are placeholder colors, which a page replaces in light and dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike
from coppice.core.records import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, PAPER, FAINT = "#1b1f24", "#fefefd", "#8a8f98"
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
WIDTH = 8.0  # inches: the width of the page's column, so that text keeps its size

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "text.parse_math": False,  # the name of a model may contain a dollar sign
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "text.hinting": "none",  # text then has the same width at every resolution and in every format
}


@contextmanager
def styled(name: str) -> Iterator[None]:
    """Apply the common style while the block draws and writes the figure called `name`."""
    import matplotlib

    # matplotlib makes SVG ids from the salt: one salt per figure, because a page may hold several figures
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        yield


def new_figure() -> Figure:
    """Return a new figure that leaves pyplot's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.2))
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: PathLike, name: str) -> str:
    """Write `{name}.svg` and `{name}.png` into `folder`; return the text of the SVG."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is now fixed, so both files have the same one
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})  # without a date, equal figures make equal files
    svg = text.getvalue()
    folder = Path(folder)
    with atomic(folder / f"{name}.svg") as file:
        file.write(svg)
    with atomic(folder / f"{name}.png", "wb") as file:
        dpi = min(150, 6000 / figure.get_size_inches().max())  # no side longer than 6000 pixels
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return svg


def for_page(svg: str, name: str) -> str:
    """Return the SVG as part of a page: no prologue and no paper, ink in the page's color, ids unique to the figure."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "none")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    # without a size in points the figure keeps only its proportions, and the style sheet sets the width
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
