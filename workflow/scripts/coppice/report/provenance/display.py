"""Show a traced chain: as text for the terminal or a pipe, and as JSON for other programs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import Record
from coppice.core.errors import CoppiceError, nearest
from coppice.render import formatting
from coppice.stats import metrics

from .agreement import Check, metrics_of, numbers_of, short
from .chain import STAGES, TITLES, Chain, Link, roles_of

if TYPE_CHECKING:
    from rich.console import Console

VERDICTS = {True: ("agrees", "green"), False: ("DIFFERS", "bold red"), None: ("unknown", "yellow")}
# The settings that the text shows, by kind of record; --json shows all of them.
SHOWN_SETTINGS = {
    "training": (
        "data",
        "lora",
        "epochs",
        "max_steps",
        "learning_rate",
        "schedule",
        "batch_size",
        "prompt",
        "train",
        "objective",
    ),
    "evaluation": ("purpose", "perplexity", "zero_shot", "answers", "retrieval", "classification", "engine"),
}


def values(chain: Chain, metric: str | None, stage: str | None = None) -> list[Record]:
    """Return the requested numbers as [{metric, stage, value, record, key}], key being the place in the record.

    Args:
        chain: a `Chain`.
        metric: the key of one, recovered or validation_loss; None for all that reports show.
        stage: dense, pruned or finetuned; None for all.
    """
    rows = []
    for name in (STAGES if chain.kind == "pair" else ("report",)) if stage is None else (stage,):
        link = chain[name]
        for one in metrics_of(link.record or {}):
            if one.key == metric or (metric is None and one.reported):
                rows.append(_row(one.key, name, one.value(link.record), link, _place(one)))
    if metric in ("recovered", None) and stage is None and chain["comparison"].record:
        rows += _recovered(chain["comparison"])
    loss = chain["arm"].at("validation_loss")  # None for an arm that was stopped early or did not fit into memory
    if metric in ("validation_loss", None) and loss is not None:
        rows.append(_row("validation_loss", "arm", loss, chain["arm"], "validation_loss"))
    return rows


def known_metrics(chain: Chain) -> list[str]:
    """Return the metrics that `values` accepts for this chain."""
    link = next((chain[name] for name in (*STAGES, "report", "selection") if chain[name].record), None)
    more = ("recovered",) if chain.kind == "pair" else ("validation_loss",)
    held = numbers_of(link.record) if link else {}
    return [*held, *more]


def check_metric(metric: str | None, valid: Collection[str]) -> None:
    """Raise CoppiceError if `metric` is neither None nor one of `valid`."""
    if metric is not None and metric not in valid:
        raise CoppiceError(
            f"--metric {metric}: there is no such metric; use one of {', '.join(valid)}{nearest(metric, valid)}"
        )


def _recovered(comparison: Link) -> Iterator[Record]:
    """Yield a row for every recovered share that the comparison holds."""
    for metric in metrics.found_in(comparison.record):
        value = (metric.part(comparison.record).get("recovered") or {}).get("value")
        if value is not None:
            place = f"{_place(metric).removesuffix('.value')}.recovered.value"
            yield _row(f"recovered {metric.key}", "finetuned", value, comparison, place)


def _place(metric: metrics.Metric) -> str:
    """Return the dotted path of a metric in an evaluation's record."""
    return f"{metric.section}.{metric.name}.value" if metric.name else metric.section


def _row(metric: str, stage: str, value: float | None, link: Link, key: str) -> Record:
    return {"metric": metric, "stage": stage, "value": value, "record": str(link.path), "key": key}


def as_dict(chain: Chain, checks: Sequence[Check], notes: Sequence[str], rows: Sequence[Record]) -> Record:
    """Return the whole chain with its checks and notes, for `--json`."""
    return {
        "of": chain.identity | {"kind": chain.kind, "seed": chain.seed},
        "numbers": rows,
        "records": [_record(link) for link in chain.whole],
        "checks": [vars(check) for check in checks],
        "notes": notes,
        "agrees": not any(check.agrees is False for check in checks),
    }


def _record(link: Link) -> Record:
    provenance = link.provenance
    keys = ("started", "seconds", "seed", "device", "threads", "settings", "fingerprints", "versions")
    details = {key: provenance.get(key) for key in keys}
    return {"name": link.name, "path": str(link.path), "whole": link.problem is None, "problem": link.problem} | details


def show(console: Console, chain: Chain, checks: Sequence[Check], notes: Sequence[str], rows: Sequence[Record]) -> None:
    """Print the numbers, every record and every check to a `rich` console."""
    console.print(" ".join(str(value) for value in chain.identity.values()), style="bold")
    show_values(console, rows)
    if chain.report:
        console.print(f"\nreport  {chain.report}", style="bold", soft_wrap=True)
    for link in chain.links.values():
        _show_link(console, TITLES.get(link.name, link.name), link)
    for name, link in chain.datasets.items():
        if link:
            _show_link(console, f"data set {name}", link)
        else:
            console.print(f"\ndata set {name}  (its record is not among the resources)", soft_wrap=True)
    console.print("\nChecks", style="bold")
    for check in checks:
        show_check(console, check)
    for note in notes:
        console.print(f"  note     {note}", soft_wrap=True)
    wrong = any(check.agrees is False for check in checks)
    console.print(tally(checks), style="bold red" if wrong else "bold")


def show_values(console: Console, rows: Iterable[Record]) -> None:
    """Print rows of `values`: each number with its record and its place in the record."""
    for row in rows:
        console.print(
            f"  {row['stage']:<10}{row['metric']:<24}{row['value']:.6g}   {row['record']}: {row['key']}", soft_wrap=True
        )


def show_check(console: Console, check: Check) -> None:
    """Print one `Check` on a line."""
    verdict, style = VERDICTS[check.agrees]
    console.print(f"  {verdict:<9}", style=style, end="")
    console.print(f"{check.what}: {check.detail}", soft_wrap=True)


def tally(checks: Collection[Check]) -> str:
    """Return a sentence that counts the checks that agree, differ or are unknown."""
    wrong = sum(check.agrees is False for check in checks)
    unknown = sum(check.agrees is None for check in checks)
    agree = len(checks) - wrong - unknown
    return f"{formatting.count(len(checks), 'check')}: {agree} agree, {wrong} differ, {unknown} unknown"


def _show_link(console: Console, title: str, link: Link) -> None:
    state = "checksum agrees" if link.problem is None else "DAMAGED OR MISSING"
    console.print(
        f"\n{title}  {link.path}  ({state})", style="bold" if link.problem is None else "bold red", soft_wrap=True
    )
    for key, value in facts(link):
        console.print(f"  {key:<13}{value}", soft_wrap=True)


def facts(link: Link) -> list[tuple[str, object]]:
    """Return (key, text) of a record's main facts, such as when it was made, its seed and its settings."""
    provenance = link.provenance
    made = [provenance.get("started"), _seconds(provenance.get("seconds")), provenance.get("device")]
    rows = [("made", ", ".join(filter(None, made))), ("seed", provenance.get("seed"))]
    rows += [*_own(link), ("settings", _settings(link)), ("fingerprints", _prints(link))]
    rows += [("versions", ", ".join(f"{k} {v}" for k, v in (provenance.get("versions") or {}).items()))]
    return [(key, value) for key, value in rows if value not in (None, "", [])]


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.1f} s"


def _own(link: Link) -> list[tuple[str, str | None]]:
    """Return (key, text) of the facts that only this kind of record has."""
    if link.name == "selection" and link.record:
        criterion = link.at("criterion", "words")
        return [("chosen", f"{link.at('candidate')} by {criterion} = {link.at('value'):.6g}")]
    if link.at("roles"):
        rows = ", ".join(f"{role} {facts['rows']}" for role, facts in link.at("roles").items())
        return [("source", _flat(link.at("source"))), ("rows", rows), ("notes", "; ".join(link.at("notes") or []))]
    if link.name == "model":
        commit = {key: link.at(key) for key in ("revision", "commit") if link.at(key)}
        return [("source", _flat((link.at("source") or {}) | commit)), ("checkpoint", link.at("path"))]
    return [("origin", link.at("origin"))]


def _settings(link: Link) -> str:
    settings = link.provenance.get("settings") or {}
    kind = "training" if link.name in ("training", "arm") else "evaluation" if "zero_shot" in settings else None
    return _flat({key: settings[key] for key in SHOWN_SETTINGS.get(kind, settings) if key in settings})


def _prints(link: Link) -> str:
    prints = link.fingerprints or {"weights": link.at("weights_fingerprint")}
    prints = roles_of(link) or prints
    return ", ".join(_print(name, value) for name, value in prints.items() if value)


def _print(name: str, value: object) -> str:
    if isinstance(value, dict):
        return f"{name} ({', '.join(_print(*one) for one in value.items() if one[1])})"
    return f"{name} {short(value)}"


def _flat(value: object) -> str:
    """Return nested settings on one line, without those that are not set."""
    if isinstance(value, dict):
        inside = ((key, _flat(one)) for key, one in value.items() if one not in (None, {}, []))
        return ", ".join(f"{key} ({text})" if ", " in text else f"{key} {text}" for key, text in inside)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
