"""Shared parts of the self-contained HTML reports and their Markdown versions: style, sortable tables, escaping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike, Record

if TYPE_CHECKING:
    from jinja2 import Environment

SHARED = Path(__file__).parent


def render(folder: PathLike, name: str, content: Mapping[str, object]) -> str:
    """Return the text of the template `name` in `folder`, filled in with `content` and escaped (see `environment`)."""
    text = environment(folder).get_template(name).render(content)
    if name.endswith(".md.j2"):
        # Quotes are harmless outside of HTML attributes, and entities make Markdown hard to read. A text that contains
        # such an entity itself is not changed, because escaping has turned its `&` into `&amp;`.
        text = text.replace("&#39;", "'").replace("&#34;", '"')
    return text


def environment(folder: PathLike) -> Environment:
    """Return a Jinja environment of the templates in `folder` and the shared ones here, with autoescaping on.

    Markdown is escaped, too: a name may contain markup, and Markdown may contain HTML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelled name raises an error instead of printing nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["drawn"] = Markup  # SVG of our own figures: matplotlib has escaped its texts
    templates.filters["slug"] = _slug
    templates.filters["choice"] = _choice
    templates.filters["flat"] = lambda rows: [[_flat(cell) for cell in row] for row in rows]
    # in Markdown, a bar or a line break would end the cell of a table
    templates.filters["bar"] = lambda text: str(text).replace("|", "¦").replace("\n", " ")
    return templates


def _slug(text: object) -> str:
    """Return an id for a heading: letters, digits and dashes, plus a hash of the text if it has other characters."""
    import hashlib

    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in str(text))
    return plain if plain == str(text) else f"{plain}-{hashlib.sha256(str(text).encode()).hexdigest()[:8]}"


def _choice(item: Record, picked: object) -> object:
    """Return the text of the choice that was picked, or "choice N", counted from 1, if the item did not keep it.

    What a model wrote is returned as it is.
    """
    if item.get("is_written") or not str(picked).isdigit():
        return picked
    choices, place = item.get("choices") or [], int(picked)
    return choices[place] if place < len(choices) else f"choice {place + 1}"


def _flat(cell: Record) -> str:
    return f"{cell['text']} {cell['note']}".strip()
