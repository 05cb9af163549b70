"""Render `comparison_report.txt` as plain text, from the record of a comparison."""

import io

from coppice.core.errors import printable
from coppice.render import formatting

WIDTH = 100


def render(record):
    """Return the report as text, at most 100 columns wide."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(f"{record['model']} / {record['config']}: before and after fine-tuning")
    console.print("=" * (len(record["model"]) + len(record["config"]) + 33))
    console.print(_subject(record))
    console.print("\nPerplexity (lower is better)", _perplexity(record))
    console.print(_perplexity_notes(record), end="")
    if record["zero_shot"]:
        console.print("\nZero-shot accuracy (higher is better)", _zero_shot(record))
        console.print(_mean(record))
    if "seeds" in record:
        console.print(
            "Repeated training (fine-tuned model; brackets: 95 % interval of the mean over seeds)",
            _seeds(record["seeds"]),
        )
    console.print(_cost(record["cost"]))
    for warning in record["warnings"]:
        console.print(f"WARNING: {printable(warning)}")
    console.print(
        "\nBrackets hold 95 % paired bootstrap intervals.\n"
        "p is from an exact McNemar test, with Holm's correction over the tasks.\n"
        '"no clear change" means p >= 0.05; for perplexity and the mean, that the interval includes 0.\n'
        "recovered = (tuned - pruned) / (dense - pruned).\n"
        "To check the records behind these numbers, run `coppice trace` with the path of this file."
    )
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _subject(record):
    """Return the lines about what is compared: the candidate, how it was pruned and selected, and its size."""
    dense, pruned = record["parameters"]["dense"], record["parameters"]["pruned"]
    chosen = record["selection"]
    criterion = chosen["criterion"]
    how = ", ".join(
        f"{key} {_plain(value)}" for key, value in record["pruning"].items() if value is not None and key != "name"
    )
    return (
        f"Candidate   {record['candidate']} ({how})\n"
        f"Chosen by   {criterion['words']}: {chosen['value']:.4g} on the {criterion.get('split', 'selection')} rows\n"
        f"{_indented(chosen['runner_up'] and formatting.margin(chosen['runner_up']))}"
        f"{_indented(record['reused_from'] and formatting.reused(record['reused_from']))}"
        f"Parameters  {pruned:,} of {dense:,} ({100 * pruned / dense:.1f} % of the dense model)"
    )


def _indented(text):
    """Return `text` as a line that continues the one above; nothing if there is no text."""
    return f"            {text}\n" if text else ""


def _plain(value):
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(*columns):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, (name, justify) in enumerate(columns):
        # a long name may take two lines, but a number never does, and names keep at least ten columns
        table.add_column(name, justify=justify, no_wrap=place > 0, overflow="fold", min_width=None if place else 10)
    return table


def _perplexity(record):
    table = _table(
        ("text", "left"),
        ("dense", "right"),
        ("pruned", "right"),
        ("tuned", "right"),
        ("change", "right"),
        ("%", "right"),
        ("recovered", "right"),
        ("verdict", "left"),
    )
    for name, text in record["perplexity"].items():
        table.add_row(
            name,
            *(_level(text[stage]) for stage in ("dense", "pruned", "finetuned")),
            _perplexity_change(text["change"]),
            f"{text['change_percent']:+.1f}",
            _share(text["recovered"], noted=False),
            text["verdict"],
        )
    protocol = next(iter(record["perplexity"].values()), {}).get("protocol")
    if protocol:
        table.caption = (
            f"protocol {protocol['name']}: windows of {protocol['seq_len']} tokens, stride {protocol['stride']}"
        )
        table.caption_justify = "left"
    return table


def _perplexity_notes(record):
    """Return why a recovered fraction is undefined or has no interval: the table has no room for the reason."""
    notes = {name: text["recovered"]["note"] for name, text in record["perplexity"].items()}
    return "".join(f"recovered on {name}: {note}\n" for name, note in notes.items() if note)


def _zero_shot(record):
    table = _table(
        ("task", "left"),
        ("metric", "left"),
        ("n", "right"),
        ("dense", "right"),
        ("pruned", "right"),
        ("tuned", "right"),
        ("change (points)", "right"),
        ("p", "right"),
        ("verdict", "left"),
    )
    for name, task in record["zero_shot"].items():
        table.add_row(
            name,
            task["metric"],
            str(task["n"]),
            *(f"{100 * task[stage]:.1f}" for stage in ("dense", "pruned", "finetuned")),
            _points(task["change"]),
            f"{task['p_holm']:.3f}" if task["p_holm"] >= 0.001 else "<.001",
            task["verdict"],
        )
    mean = record["average_acc"]
    table.add_section()
    table.add_row(
        "mean",
        "",
        "",
        *(f"{100 * mean[stage]:.1f}" for stage in ("dense", "pruned", "finetuned")),
        _points(mean["change"]),
        "",
        mean["verdict"],
    )
    return table


def _mean(record):
    mean, extremes = record["average_acc"], record["extremes"]
    changes = {name: record["zero_shot"][name]["change"]["value"] * 100 for name in extremes.values()}
    return (
        f"Recovered share of the lost mean accuracy: {_share(mean['recovered'])}\n"
        f"Largest change: {extremes['largest']} {changes[extremes['largest']]:+.1f} points; "
        f"smallest: {extremes['smallest']} {changes[extremes['smallest']]:+.1f} points\n"
    )


def _level(value, sign=""):
    """Return a perplexity as text: the larger it is, the fewer decimals."""
    digits = 2 if abs(value) < 1000 else 0
    return f"{value:{sign}.{digits}f}" if abs(value) < 1e6 else f"{value:{sign}.1e}"


def _perplexity_change(change):
    """Return a change of perplexity as text, with its interval if it has one."""
    bounds = change["interval"]
    return _level(change["value"], "+") + (f" [{_level(bounds[0], '+')}, {_level(bounds[1], '+')}]" if bounds else "")


def _seeds(seeds):
    """Return the table of every metric by seed, with mean and standard deviation."""
    columns = [(f"seed {seed}", "right") for seed in seeds["seeds"]]
    table = _table(("metric", "left"), *columns, ("mean", "right"), ("sd", "right"))
    for name, part in seeds["metrics"].items():
        scale = 100 if name == "average_acc" else 1
        bounds = part["interval"]
        mean = _level(scale * part["mean"])
        if bounds:
            mean += f" [{_level(scale * bounds[0])}, {_level(scale * bounds[1])}]"
        spread = "" if part["sd"] is None else _level(scale * part["sd"])
        table.add_row(name, *(_level(scale * value) for value in part["values"]), mean, spread)
    return table


def _points(change):
    bounds = change["interval"]
    value = f"{100 * change['value']:+.1f}"
    return f"{value} [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else value


def _share(recovered, noted=True):
    note = f" ({recovered['note']})" if noted else ""
    if recovered["value"] is None:
        return f"undefined{note}"
    text = f"{100 * recovered['value']:.0f} %"
    if recovered["interval"] is None:
        return f"{text}{note}"
    return f"{text} [{100 * recovered['interval'][0]:.0f}, {100 * recovered['interval'][1]:.0f}]"


def _cost(cost):
    evaluations = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in cost["evaluation_seconds"].items())
    return (
        f"Cost        training: {cost['training_seconds']:.0f} s, {cost['training_tokens']:,} tokens, "
        f"{cost['trainable_parameters']:,} trainable parameters\n"
        f"            peak memory in training: {formatting.memory(cost['training_peak_memory_bytes'])}\n"
        f"            evaluation: {evaluations}"
    )
