"""Pages: what the self-contained HTML reports and their Markdown twins share: style, sortable tables, escaping."""

from pathlib import Path

SHARED = Path(__file__).parent


def environment(folder):
    """The templates in `folder` and the shared ones here, with autoescaping on, Markdown included: a name may hold
    markup, and Markdown may hold HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["drawn"] = Markup  # the figures' own SVG, made by matplotlib, which escapes its texts
    templates.filters["slug"] = _slug
    templates.filters["choice"] = _choice
    templates.filters["flat"] = lambda rows: [[_flat(cell) for cell in row] for row in rows]
    templates.filters["bar"] = lambda text: str(text).replace("|", "¦").replace("\n", " ")
    return templates


def _slug(text):
    """An id for a heading: letters, digits and dashes, and the text's digest where something else was in it."""
    import hashlib

    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in str(text))
    return plain if plain == str(text) else f"{plain}-{hashlib.sha256(str(text).encode()).hexdigest()[:8]}"


def _choice(item, picked):
    """What was picked, in words where the item's choices were kept, else the choice's number, from 1."""
    if not str(picked).isdigit():
        return picked
    choices, place = item.get("choices") or [], int(picked)
    return choices[place] if place < len(choices) else f"choice {place + 1}"


def _flat(cell):
    return f"{cell['text']} {cell['note']}".strip()
