"""Render the study's report and its terminal overview from records alone.

Nothing here loads a model, imports torch or recomputes what a record holds. The report lists missing records as
missing and damaged records as failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike, Record

if TYPE_CHECKING:
    from rich.console import Console

FIGURES = ("tradeoff", "recovered", "task_changes", "candidates", "ranks", "size", "training", "cost")
TABLES = ("comparisons", "tasks", "candidates")

__all__ = ["FIGURES", "TABLES", "ablations", "overview", "write_report"]


def write_report(
    results: PathLike,
    pairs: Sequence[tuple[str, str]],
    models: Mapping[str, Record],
    output: PathLike,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Render the study under `results` into the folder `output`, however much of the study is finished.

    Writes `study_report.html`, `study_report.md`, one CSV file per name in `TABLES`, and `figures/{name}.png` and
    `.svg` for each name in `FIGURES`.

    Args:
        results: the study's results folder.
        pairs: list of (model, config).
        models: model -> {variant ("base" or "instruct"), family, base}.
        output: the folder to write to.
        metadata: name -> value, extra facts about the run that the page shows.
    """
    from . import page

    page.write(results, pairs, models, output, metadata or {})


def overview(results: PathLike, pairs: Sequence[tuple[str, str]], console: Console) -> None:
    """Print one table row per model and config: accuracy, perplexity, recovered share and state."""
    from . import terminal

    terminal.overview(results, pairs, console)


def ablations(results: PathLike) -> list[str]:
    """Return the lines that describe the ablations under `results`; empty if none has started."""
    from . import terminal

    return list(terminal.ablations(results))
