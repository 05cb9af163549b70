"""The report as one HTML page that opens from disk, the same as Markdown, and its tables and figures as files."""

import time
from pathlib import Path

from ..records import atomic
from . import FIGURES, TABLES, answers, evidence, figures, sections, study, tables, terminal

TEMPLATES = Path(__file__).parent / "templates"
PAGES = {"study_report.html": "study_report.html.j2", "study_report.md": "study_report.md.j2"}


def write(results, pairs, models, output, metadata):
    """Write all files of the report to the folder `output`; arguments as for `reporting.write_report`."""
    output = Path(output)
    found = study.read(results, pairs, models)
    frames = {
        "comparisons": tables.comparisons(found),
        "tasks": tables.tasks(found),
        "candidates": tables.candidates(found),
        "jobs": tables.jobs(found),
    }
    for name in TABLES:
        with atomic(output / f"{name}.csv") as file:
            frames[name].to_csv(file, index=False)
    pictures = figures.draw(found, frames, output / "figures")
    content = _content(found, evidence.gather(found), metadata)
    for name, template in PAGES.items():
        text = _environment().get_template(template).render(content, svg=pictures)
        with atomic(output / name) as file:
            file.write(text)


def _content(found, known, metadata):
    """What the templates show, in display form."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "tally": terminal.tally(found),
        "answers": answers.answers(found, known),
        "main": sections.main_table(found),
        "figures": [(name, *sections.CAPTIONS[name]) for name in FIGURES],
        "models": [sections.model_section(found, name, known) for name in found.models],
        "measured": sections.measured(found, metadata),
        "failed": found.failed,
        "absent": found.absent,
        "notes": known.notes,
    }


def _environment():
    """Templates with autoescaping on, Markdown included: a name may hold markup, and Markdown may hold HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = Markup  # the figures' own SVG, made by matplotlib, which escapes its texts
    environment.filters["slug"] = _slug
    environment.filters["choice"] = _choice
    environment.filters["flat"] = lambda rows: [[_flat(cell) for cell in row] for row in rows]
    environment.filters["bar"] = lambda text: str(text).replace("|", "¦").replace("\n", " ")
    return environment


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
