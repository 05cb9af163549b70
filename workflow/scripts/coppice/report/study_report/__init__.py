"""The report of a study, and its standing in the terminal, rendered from records alone.

Nothing here loads a model or imports torch; what a study lacks is listed as absent, a damaged record as failed.
"""

FIGURES = ("tradeoff", "recovered", "task_changes", "candidates", "ranks", "size", "training", "cost")
TABLES = ("comparisons", "tasks", "candidates")

__all__ = ["FIGURES", "TABLES", "ablations", "overview", "write_report"]


def write_report(results, pairs, models, output, metadata=None):
    """Render the study under `results` into the folder `output`.

    pairs: list of (model, config); models: name -> {variant (base|instruct), family, base}; metadata: what else the
    page should say about the run, by name. Writes `study_report.html`, `study_report.md`, a CSV file for each name in
    `TABLES` and `figures/{name}.png` and `.svg` for each name in `FIGURES`, whatever the study holds by now.
    """
    from . import page

    page.write(results, pairs, models, output, metadata or {})


def overview(results, pairs, console):
    """Print the table of models and configs: accuracies, perplexities, what came back, and where each pair stands."""
    from . import terminal

    terminal.overview(results, pairs, console)


def ablations(results):
    """Where the ablations under `results` stand, a line each; none where none was begun."""
    from . import terminal

    return list(terminal.ablations(results))
