"""Write the report: a self-contained HTML page, the same page as Markdown, CSV tables and figures."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from coppice.core.aliases import PathLike, Record
from coppice.core.records import atomic
from coppice.render import html

from . import (
    TABLES,
    answers,
    csv_tables,
    figures,
    how_measured,
    measurements,
    sections,
    shown_rows,
    study_records,
    terminal,
)

TEMPLATES = Path(__file__).parent / "templates"
PAGES = {"study_report.html": "study_report.html.j2", "study_report.md": "study_report.md.j2"}


def write(
    results: PathLike,
    pairs: Sequence[tuple[str, str]],
    models: Mapping[str, Record],
    output: PathLike,
    metadata: Mapping[str, object],
) -> None:
    """Write all files of the report to the folder `output`; for the arguments see `study_report.write_report`."""
    output = Path(output)
    study = study_records.read(results, pairs, models)
    frames = {
        "comparisons": csv_tables.comparisons(study),
        "tasks": csv_tables.tasks(study),
        "candidates": csv_tables.candidates(study),
        "jobs": csv_tables.jobs(study),
    }
    for name in TABLES:
        with atomic(output / f"{name}.csv") as file:
            frames[name].to_csv(file, index=False)
    content = _content(study, metadata) | {"figures": figures.draw(study, frames, output / "figures")}
    for name, template in PAGES.items():
        text = html.render(TEMPLATES, template, content)
        with atomic(output / name) as file:
            file.write(text)


def _content(study: study_records.Study, metadata: Mapping[str, object]) -> dict[str, object]:
    """Return the templates' variables, with every number already formatted."""
    measured = [measurements.gather(group) for group in study.groups]
    data = shown_rows.data_sets(study.results)
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "tally": terminal.tally(study),
        "groups": [
            {
                "title": group.title if group.is_part else "",
                "answers": answers.answers(group, own),
                "tables": sections.main_tables(group),
            }
            for group, own in zip(study.groups, measured, strict=True)
        ],
        "models": [
            sections.model_section(group, name, own, data)
            for group, own in zip(study.groups, measured, strict=True)
            for name in group.models
        ],
        "measured": how_measured.measured(study, metadata),
        "failed": study.failed,
        "absent": study.absent,
        "notes": [note for own in measured for note in own.notes],
    }
