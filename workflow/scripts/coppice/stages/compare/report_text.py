"""Render `comparison_report.txt` as plain text, from the record of a comparison."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import Estimate, Record
from coppice.core.errors import printable
from coppice.models import sparsity
from coppice.render import formatting
from coppice.stats import metrics

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

WIDTH = 100
STAGES = ("dense", "pruned", "finetuned")


def render(record: Record) -> str:
    """Return the report as text, at most 100 columns wide."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(f"{record['model']} / {record['config']}: before and after fine-tuning")
    console.print("=" * (len(record["model"]) + len(record["config"]) + 33))
    console.print(_subject(record))
    # An image-text model, for instance, may have no texts for perplexity
    entries = [entry for entry in metrics.in_detail(metrics.held_by(record)) if record[entry.section]]
    for group in _groups(entries):
        mean = next((one for one in entries if one.mean_of == group[0].section), None)
        if group[0].mean_of or (mean and not mean.part(record)):
            continue
        console.print(f"\n{_heading(group)} ({group[0].better})", _changes(record, group, mean))
        console.print(_notes(record, group), end="")
        if mean:
            console.print(_mean(record, mean))
    if "seeds" in record:
        console.print(
            "Repeated training (fine-tuned model; brackets: 95 % interval of the mean over seeds)",
            _seeds(record["seeds"]),
        )
    console.print(_cost(record["cost"]))
    for warning in record["warnings"]:
        console.print(f"WARNING: {printable(warning)}")
    console.print(f"\n{_key(entries)}")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _subject(record: Record) -> str:
    """Return the lines about what is compared: the candidate, how it was pruned and selected, and its size."""
    dense, pruned = record["parameters"]["dense"], record["parameters"]["pruned"]
    chosen = record["selection"]
    criterion = chosen["criterion"]
    return (
        f"Candidate   {record['candidate']} ({formatting.pruning(record['pruning'])})\n"
        f"Chosen by   {criterion['words']}: {chosen['value']:.4g} on the {criterion.get('split', 'selection')} rows\n"
        f"{_indented(chosen['runner_up'] and formatting.margin(chosen['runner_up']))}"
        f"{_indented(record['reused_from'] and formatting.reused(record['reused_from']))}"
        f"Parameters  {pruned:,} of {dense:,} ({100 * pruned / dense:.1f} % of the dense model)"
        f"{_zeros(record)}"
    )


def _zeros(record: Record) -> str:
    """Return the lines about weights that pruning set to zero; nothing if there are none."""
    found = (record.get("sparsity") or {}).get("pruned")
    if not sparsity.is_sparse(found):
        return ""
    lines = [f"\nZeros       {found['zeros']:,} of {found['weights']:,} weights ({sparsity.described(found)})"]
    for text, value in ((record.get("masked_merge") or {}).get("perplexity") or {}).items():
        beside = record["perplexity"][text]["finetuned"]
        lines.append(
            f"            perplexity on {text}: {value:.4g} with the adapter merged and these zeros kept, {beside:.4g} "
            "with it beside the weights"
        )
    return "\n".join(lines)


def _indented(text: str | None) -> str:
    """Return `text` as a line that continues the one above; nothing if there is no text."""
    return f"            {text}\n" if text else ""


def _table(*columns: tuple[str, JustifyMethod]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, (name, justify) in enumerate(columns):
        # a long name may take two lines, but a number never does, and names keep at least ten columns
        table.add_column(name, justify=justify, no_wrap=place > 0, overflow="fold", min_width=None if place else 10)
    return table


def _groups(entries: Sequence[metrics.Metric]) -> list[list[metrics.Metric]]:
    """Return the entries by table: those that one evaluator measures, in one direction."""
    found: dict[tuple, list[metrics.Metric]] = {}
    for entry in entries:
        found.setdefault((entry.setting, entry.mean_of, entry.higher_is_better), []).append(entry)
    return list(found.values())


def _heading(group: Sequence[metrics.Metric]) -> str:
    """Return the heading of a table: the evaluator if rows name their metrics, or else what all rows measure."""
    named = _names_metrics(group) and group[0].setting
    return named[0].capitalize() if named else group[0].heading


def _names_metrics(group: Sequence[metrics.Metric]) -> bool:
    """Return whether the rows of a table name metrics. Tables of tasks and of texts have one, named above them."""
    return len(group) > 1 or group[0].dataset == "data set"


def _key(entries: Sequence[metrics.Metric]) -> str:
    """Return the lines that explain the tables."""
    tested = [entry for entry in entries if entry.right_or_wrong]
    words = [entry.kind for entry in entries if not entry.right_or_wrong and not entry.mean_of]
    words += ["the mean"] if any(entry.mean_of for entry in entries) else []
    lines = ["Brackets hold 95 % paired intervals over items, documents, or blocks of windows."]
    if tested:
        over = formatting.listed(dict.fromkeys(f"{entry.dataset}s" for entry in tested))
        lines.append(f"p is from an exact McNemar test, with Holm's correction over the {over}.")
    by_interval = f"; for {formatting.listed(words)}, that the interval includes 0" if words else ""
    lines += [
        f'"no clear change" means {f"p >= 0.05{by_interval}" if tested else "that the interval includes 0"}.',
        "recovered = (tuned - pruned) / (dense - pruned).",
        "To check the records behind these numbers, run `coppice trace` with the path of this file.",
    ]
    return "\n".join(lines)


def _changes(record: Record, group: Sequence[metrics.Metric], mean: metrics.Metric | None) -> Table:
    """Return the table of some metrics on every data set: their values at each stage and what fine-tuning changed.

    group: entries of `METRICS`; mean: the entry of the mean over these data sets, which ends the table, or None.
    """
    first, named = group[0], _names_metrics(group)
    shares, tested = (any(getattr(entry, key) for entry in group) for key in ("reported", "right_or_wrong"))
    columns: list[tuple[str, JustifyMethod, bool]] = [
        ("metric" if named else first.dataset, "left", True),
        ("metric", "left", "metric" in first.facts),
        ("n", "right", "n" in first.facts),
        *((stage, "right", True) for stage in ("dense", "pruned", "tuned")),
        ("change (points)" if first.difference_unit == "points" else "change", "right", True),
        ("%", "right", first.log),
        ("recovered", "right", shares),
        ("p", "right", tested),
        ("verdict", "left", True),
    ]
    table = _table(*((name, justify) for name, justify, shown in columns if shown))
    protocol = None
    for metric in metrics.found_in(record, [*group, mean] if mean else group):
        part = metric.part(record)
        if metric.mean_of:
            table.add_section()
        protocol = protocol or part.get("protocol")
        cells = (
            "mean" if metric.mean_of else metric.with_unit(metric.spoken) if named else metric.name,
            part.get("metric", ""),
            str(part.get("n", "")),
            *(_level(metric, part[stage]) for stage in STAGES),
            _change(metric, part["change"]),
            f"{part['change_percent']:+.1f}" if metric.log else "",
            _share(part["recovered"], noted=False) if metric.reported else "",
            _probability(part.get("p_holm")),
            part["verdict"],
        )
        table.add_row(*(cell for cell, (*_, shown) in zip(cells, columns, strict=True) if shown))
    if protocol:
        table.caption = (
            f"protocol {protocol['name']}: windows of {protocol['seq_len']} tokens, stride {protocol['stride']}"
        )
        table.caption_justify = "left"
    return table


def _probability(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<.001"


def _notes(record: Record, group: Sequence[metrics.Metric]) -> str:
    """Return what intervals resample, and why a recovered fraction has none: the table has no room for it."""
    shown = [metric for metric in metrics.found_in(record, group) if metric.reported]
    parts = [metric.part(record) for metric in shown]
    names = [metric.name for metric in shown]
    lines = [f"intervals on {n}: over {formatting.units(p['resampled'])}\n" for n, p in zip(names, parts, strict=True)]
    names = [metric.spoken for metric in shown] if _names_metrics(group) else names
    notes = [(name, part["recovered"]["note"]) for name, part in zip(names, parts, strict=True)]
    return "".join(dict.fromkeys(lines + [f"recovered on {name}: {note}\n" for name, note in notes if note]))


def _mean(record: Record, entry: metrics.Metric) -> str:
    """Return the lines below the table of a mean's parts: its recovered share, and the parts that changed most."""
    extremes, parts = record["extremes"], record[entry.mean_of]
    changes = {name: entry.shown(parts[name]["change"]["value"], "+") for name in extremes.values()}
    return (
        f"Recovered share of the lost {entry.spoken}: {_share(entry.part(record)['recovered'])}\n"
        f"Largest change: {extremes['largest']} {changes[extremes['largest']]} points; "
        f"smallest: {extremes['smallest']} {changes[extremes['smallest']]} points\n"
    )


def _level(metric: metrics.Metric, value: float, sign: str = "", digits: int | None = None) -> str:
    """Return a value in its unit as text: a large one has no decimals."""
    value, digits = metric.scale * value, metric.digits if digits is None else digits
    return f"{value:{sign}.{digits if abs(value) < 1000 else 0}f}" if abs(value) < 1e6 else f"{value:{sign}.1e}"


def _change(metric: metrics.Metric, change: Estimate) -> str:
    """Return a change as text, with its interval if it has one."""
    value, bounds = _level(metric, change["value"], "+"), change["interval"]
    return f"{value} [{', '.join(_level(metric, bound, '+') for bound in bounds)}]" if bounds else value


def _seeds(seeds: Record) -> Table:
    """Return the table of every metric by seed, with mean and standard deviation."""
    columns: list[tuple[str, JustifyMethod]] = [(f"seed {seed}", "right") for seed in seeds["seeds"]]
    table = _table(("metric", "left"), *columns, ("mean", "right"), ("sd", "right"))
    for name, part in seeds["metrics"].items():
        metric = metrics.named(name)
        values = [_level(metric, value, digits=2) for value in part["values"]]
        bounds = [_level(metric, bound, digits=2) for bound in part["interval"] or ()]
        mean = _level(metric, part["mean"], digits=2) + (f" [{', '.join(bounds)}]" if bounds else "")
        table.add_row(name, *values, mean, "" if part["sd"] is None else _level(metric, part["sd"], digits=2))
    return table


def _share(recovered: Estimate, noted: bool = True) -> str:
    note = f" ({recovered['note']})" if noted else ""
    if recovered["value"] is None:
        return f"undefined{note}"
    text = formatting.percent(recovered["value"])
    if recovered["interval"] is None:
        return f"{text}{note}"
    return f"{text} [{100 * recovered['interval'][0]:.0f}, {100 * recovered['interval'][1]:.0f}]"


def _cost(cost: Record) -> str:
    evaluations = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in cost["evaluation_seconds"].items())
    return (
        f"Cost        training: {cost['training_seconds']:.0f} s, {cost['training_tokens']:,} tokens, "
        f"{cost['trainable_parameters']:,} trainable parameters\n"
        f"            peak memory in training: {formatting.memory(cost['training_peak_memory_bytes'])}\n"
        f"            evaluation: {evaluations}"
    )
