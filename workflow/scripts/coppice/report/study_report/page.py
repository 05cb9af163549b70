"""The report as one HTML page that opens from disk, the same as Markdown, and its tables and figures as files."""

import time
from pathlib import Path

from coppice.core.records import atomic
from coppice.render import html

from . import FIGURES, TABLES, answers, figures, measurements, sections, study_records, tables, terminal

TEMPLATES = Path(__file__).parent / "templates"
PAGES = {"study_report.html": "study_report.html.j2", "study_report.md": "study_report.md.j2"}


def write(results, pairs, models, output, metadata):
    """Write all files of the report to the folder `output`; arguments as for `reporting.write_report`."""
    output = Path(output)
    found = study_records.read(results, pairs, models)
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
    content = _content(found, measurements.gather(found), metadata)
    for name, template in PAGES.items():
        text = html.environment(TEMPLATES).get_template(template).render(content, svg=pictures)
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
