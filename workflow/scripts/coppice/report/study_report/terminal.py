"""The study in the terminal: one row per model and config, at any time during a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike
from coppice.core.errors import printable
from coppice.render import formatting
from coppice.stats.metrics import Metric

from . import study_records as studies
from .job_status import Statuses

if TYPE_CHECKING:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

STYLES = {"done": "green", "running": "cyan", "waiting": "dim", "failed": "bold red", "stopped": "yellow"}


def overview(results: PathLike, pairs: Sequence[tuple[str, str]], console: Console) -> None:
    """Read `pairs` from `results` and print their accuracy, perplexity, recovered share and state."""
    show(studies.read(results, pairs), console)


def show(study: studies.Study, console: Console) -> None:
    """Print the table of a `Study`, or one table for each of its groups.

    A terminal too narrow for a whole table gets one table per metric, with long names wrapped. A pipe or a file gets
    one table, as wide as needed. Numbers are never truncated.
    """
    for group in study.groups:
        _show(group, console)


def _show(study: studies.Study, console: Console) -> None:
    """Print the table of a group by its two axes, or else by the first two metrics that it has."""
    from rich.measure import Measurement

    def width_of(table: Table) -> Measurement:
        # rich caps a measurement at the console's width; a large max_width gives the width the table really needs
        return Measurement.get(console, console.options.update(max_width=10_000), table)

    metrics = study.ranked_metrics[:2]
    whole = table(study, metrics)
    if not console.is_terminal:
        console.width = max(console.width, width_of(whole).maximum)
    if width_of(whole).minimum <= console.width:
        console.print(whole)
        return
    for metric in metrics:
        part = table(study, [metric], fold=True, with_state=metric is metrics[0])
        console.width = max(console.width, width_of(part).minimum)
        console.print(part)


def table(study: studies.Study, metrics: Sequence[Metric], fold: bool = False, with_state: bool = True) -> Table:
    """Return the `rich.table.Table` of a study's pairs; `fold` wraps long names over several lines."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=_caption(metrics), caption_justify="left"
    )
    for name in ("model", "config"):
        grid.add_column(name, no_wrap=not fold, overflow="fold")
    for metric in metrics:
        for title in (metric.column, "pruned", "tuned", "recov."):
            grid.add_column(title, justify="right", no_wrap=True)
    if with_state:
        longest = max((len(_state(pair)) for pair in study.pairs), default=0)
        grid.add_column("state", min_width=min(16, longest), overflow="fold")
    for model in study.models:
        for pair in study.pairs_of(model):
            cells = [cell for metric in metrics for cell in _cells(pair, metric)]
            grid.add_row(
                Text(printable(pair.model)),
                Text(printable(pair.config)),
                *cells,
                *([_state(pair)] if with_state else []),
            )
        grid.add_section()
    return grid


def _state(pair: studies.Pair) -> Text:
    from rich.text import Text

    state = Text(pair.state, style=STYLES.get(pair.state, ""))
    if pair.detail:
        state.append(f" ({formatting.shortened(printable(pair.detail))})", style="dim")
    return state


def _caption(metrics: Sequence[Metric]) -> str | None:
    names = " and ".join(printable(metric.label) for metric in metrics)
    return f"{names}: dense, pruned, fine-tuned, and the recovered share of what pruning lost" if names else None


def _cells(pair: studies.Pair, metric: Metric) -> list[str]:
    values = ["" if value is None else metric.shown(value) for value in pair.values(metric).values()]
    recovered = ((pair.measured(metric) or {}).get("recovered") or {}).get("value")
    return [*values, "" if recovered is None else formatting.percent(recovered)]


def tally(study: studies.Study) -> str:
    """Return one line that counts the pairs by state: done, running, waiting, failed, stopped."""
    states = [pair.state for pair in study.pairs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STYLES if state in states)
    return (
        f"{formatting.count(len(states), 'model and config pair')}: {counts}" if states else "no model and config pair"
    )


def ablations(results: PathLike) -> Iterator[str]:
    """Yield the lines that describe each ablation under `results`.

    The first line counts the jobs by state and names those that run and the report; one line for each failed or
    stopped job follows.
    """
    jobs = [job for job in Statuses(results).jobs if job.stage == "ablation" and job.names]
    for name in dict.fromkeys(job.names[0] for job in jobs):
        own = [job for job in jobs if job.names[0] == name]
        states = [job.state for job in own]
        counts = ", ".join(
            f"{states.count(state)} {state}" for state in dict.fromkeys([*STYLES, *states]) if state in states
        )
        busy = [" ".join(job.names[1:]) for job in own if job.state == "running"]
        line = f"ablation {name}: jobs {counts}" + (f" ({', '.join(busy)})" if busy else "")
        report = Path(results) / "ablation" / name / "ablation_report.html"
        yield line + (f"; {report}" if report.is_file() else "")
        for job in own:
            if job.state in ("failed", "stopped"):
                yield f"  {job.state}: {' '.join(job.names[1:])}: {job.reason or 'no reason recorded'}"
