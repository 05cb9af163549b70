"""The study in the terminal: one row a model and config, at any time during a run."""

from pathlib import Path

from coppice.core.errors import printable
from coppice.render import formatting

from . import study_records as studies
from .job_status import Statuses

STYLES = {"done": "green", "running": "cyan", "waiting": "dim", "failed": "bold red", "stopped": "yellow"}


def overview(results, pairs, console):
    """Print where `pairs` stand: accuracy and perplexity at each stage, what was recovered, and the state."""
    show(studies.read(results, pairs), console)


def show(study, console):
    """Print the same of a study that was read already.

    A terminal that is too narrow for one table gets one a metric, with long names over several lines; a pipe or a file
    gets one table, as wide as it has to be. No number is ever cut.
    """
    from rich.measure import Measurement

    def needed(table):
        return Measurement.get(console, console.options.update(max_width=10_000), table)

    metrics = study.metrics[:2]
    whole = table(study, metrics)
    if not console.is_terminal:
        console.width = max(console.width, needed(whole).maximum)
    if needed(whole).minimum <= console.width:
        console.print(whole)
        return
    for metric in metrics:
        part = table(study, [metric], fold=True, with_state=metric is metrics[0])
        console.width = max(console.width, needed(part).minimum)
        console.print(part)


def table(study, metrics, fold=False, with_state=True):
    """Return the `rich.table.Table` of a study's pairs; `fold` lets long names go over several lines."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=_caption(metrics), caption_justify="left"
    )
    for name in ("model", "config"):
        grid.add_column(name, no_wrap=not fold, overflow="fold")
    for metric in metrics:
        for title in ("acc %" if metric.is_accuracy else "ppl", "pruned", "tuned", "recov."):
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


def _state(pair):
    from rich.text import Text

    state = Text(pair.state, style=STYLES.get(pair.state, ""))
    if pair.detail:
        state.append(f" ({formatting.shortened(printable(pair.detail))})", style="dim")
    return state


def _caption(metrics):
    names = " and ".join(printable(metric.label) for metric in metrics)
    return f"{names}: dense, pruned, fine-tuned; recovered share of what pruning lost" if names else None


def _cells(pair, metric):
    values = [_number(value, metric) for value in pair.values(metric).values()]
    recovered = ((pair.measured(metric) or {}).get("recovered") or {}).get("value")
    return [*values, "" if recovered is None else f"{100 * recovered:.0f} %"]


def _number(value, metric):
    return "" if value is None else f"{metric.scale * value:.{metric.digits}f}"


def tally(study):
    """One line: how many pairs are done, running, waiting, failed."""
    states = [pair.state for pair in study.pairs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STYLES if state in states)
    return (
        f"{formatting.count(len(states), 'model and config pair')}: {counts}" if states else "no model and config pair"
    )


def ablations(results):
    """A line an ablation under `results`: its jobs by state, what runs or failed, and where the report is."""
    jobs = [job for job in Statuses(results).jobs if job.stage == "ablation" and job.names]
    for name in dict.fromkeys(job.names[0] for job in jobs):
        own = [job for job in jobs if job.names[0] == name]
        states = [job.state for job in own]
        told = ", ".join(
            f"{states.count(state)} {state}" for state in dict.fromkeys([*STYLES, *states]) if state in states
        )
        busy = [" ".join(job.names[1:]) for job in own if job.state == "running"]
        line = f"ablation {name}: jobs {told}" + (f" ({', '.join(busy)})" if busy else "")
        report = Path(results) / "ablation" / name / "ablation_report.html"
        yield line + (f"; {report}" if report.is_file() else "")
        for job in own:
            if job.state in ("failed", "stopped"):
                yield f"  {job.state}: {' '.join(job.names[1:])}: {job.reason or 'no reason was given'}"
