"""How every figure looks, and how it is written as PNG and as SVG.

Colours are those of Okabe & Ito, told apart by readers with any colour vision, and never alone: shapes and labels say
the same. Ink and paper are stand-in colours, so that a page can give each figure its own in light and in dark.
"""

import io
import re
from contextlib import contextmanager
from pathlib import Path

from coppice.core.records import atomic

INK, PAPER, FAINT = "#1b1f24", "#fefefd", "#8a8f98"
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
WIDTH = 8.0  # inches: as wide as the page's column, so that text keeps its size

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
    "text.parse_math": False,  # a model may be named with a dollar sign
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "text.hinting": "none",  # text then takes the same room at every resolution and in every format
}


@contextmanager
def styled(name):
    """The look of all figures, while the block draws and writes the one called `name`."""
    import matplotlib

    # matplotlib makes ids from the salt: one for each figure, since a page may hold several
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        yield


def new_figure():
    """A figure that belongs to nobody: no state of pyplot's is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.2))
    FigureCanvasAgg(figure)
    return figure


def save(figure, folder, name):
    """Write `{name}.svg` and `{name}.png` into `folder`; returns the SVG's text."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # worked out once, for both files
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    folder = Path(folder)
    with atomic(folder / f"{name}.svg") as file:
        file.write(svg)
    with atomic(folder / f"{name}.png", "wb") as file:
        dpi = min(150, 6000 / figure.get_size_inches().max())
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return svg


def for_page(svg, name):
    """The SVG as a part of a page: no prologue, ink as the page's own colour, no paper, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "none")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    # its size in points becomes its proportions; the style sheet sets the width
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
