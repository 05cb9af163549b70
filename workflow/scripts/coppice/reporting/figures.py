"""The report's figures, drawn in their order and made fit for the page."""

import re
from pathlib import Path

from ..plotting import style
from . import FIGURES


def draw(study, frames, folder):
    """Draw every figure of `FIGURES` into `folder` as PNG and SVG; returns name -> SVG text for the page."""
    from . import courses, pictures

    drawers = {name: getattr(pictures, name, None) or getattr(courses, name) for name in FIGURES}
    inline = {}
    for name in FIGURES:
        with style.styled(name):
            figure = style.new_figure()
            drawn = drawers[name](figure, study, frames)
            if drawn is not None:
                figure.clear()
                figure.set_size_inches(style.WIDTH, 1.2)
                figure.text(0.5, 0.5, drawn, ha="center", va="center", color=style.INK, wrap=True)
            inline[name] = for_page(style.save(figure, Path(folder), name), name)
    return inline


def for_page(svg, name):
    """The SVG as a part of the page: no prologue, ink as the page's own colour, no paper, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace(style.INK, "currentColor").replace(style.PAPER, "none")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    # its size in points becomes its proportions; the style sheet sets the width
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
