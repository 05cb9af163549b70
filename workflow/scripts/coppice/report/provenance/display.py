"""A traced chain for people (the terminal, or plain text in a pipe) and for machines."""

from coppice.core.errors import CoppiceError, nearest

from .agreement import numbers_of, short
from .chain import STAGES, roles_of

MARKS = {True: ("agrees", "green"), False: ("DIFFERS", "bold red"), None: ("unknown", "yellow")}
TITLES = {
    "comparison": "comparison",
    "dense": "evaluation of the dense model",
    "pruned": "evaluation of the pruned model",
    "finetuned": "evaluation of the fine-tuned model",
    "training": "fine-tuning",
    "selection": "selection",
    "candidate": "candidate",
    "scores": "candidate's scores, on the selection rows",
    "model": "dense model",
    "arm": "arm of the ablation",
    "report": "evaluation of the arm, report rows",
}
# What of its settings a record is read for first; the rest is in --json
MATTER = {
    "training": ("data", "lora", "epochs", "max_steps", "learning_rate", "schedule", "batch_size", "prompt", "train"),
    "evaluation": ("purpose", "perplexity", "zero_shot", "engine"),
}


def values(chain, metric, stage=None):
    """[{metric, stage, value, record, key}]: the numbers asked for, and where each stands.

    metric: a task, average_acc, ppl.<text>, `recovered` for the shares that came back, or None for the means.
    """
    rows = []
    for name in (STAGES if chain.kind == "pair" else ("report",)) if stage is None else (stage,):
        link = chain[name]
        held = numbers_of(link.record) if link.record else {}
        for key, value in held.items():
            if key == metric or (metric is None and (key == "average_acc" or key.startswith("ppl."))):
                rows.append(_row(key, name, value, link, _place(key)))
    if metric in ("recovered", None) and stage is None and chain["comparison"].record:
        rows += _recovered(chain["comparison"])
    loss = chain["arm"].at("validation_loss")  # an arm that was stopped, or did not fit, has none
    if metric in ("validation_loss", None) and loss is not None:
        rows.append(_row("validation_loss", "arm", loss, chain["arm"], "validation_loss"))
    return rows


def known_metrics(chain):
    """Names that `values` takes for this chain."""
    link = next((chain[name] for name in (*STAGES, "report", "selection") if chain[name].record), None)
    more = ("recovered",) if chain.kind == "pair" else ("validation_loss",)
    held = numbers_of(link.record) if link and "perplexity" in link.record else {}
    return [*held, *more]


def check_metric(metric, valid):
    """Raise CoppiceError for a `metric` that is asked for and is none of the `valid` ones."""
    if metric is not None and metric not in valid:
        raise CoppiceError(f"--metric {metric}: valid are {', '.join(valid)}{nearest(metric, valid)}")


def _recovered(comparison):
    parts = {"average_acc": comparison.at("average_acc")}
    parts |= {f"ppl.{name}": text for name, text in comparison.at("perplexity").items()}
    for key, part in parts.items():
        value = ((part or {}).get("recovered") or {}).get("value")
        if value is not None:
            place = f"{_place(key).removesuffix('.value')}.recovered.value"
            yield _row(f"recovered {key}", "finetuned", value, comparison, place)


def _place(key):
    if key == "average_acc":
        return key
    return f"perplexity.{key.removeprefix('ppl.')}.value" if key.startswith("ppl.") else f"zero_shot.{key}.value"


def _row(metric, stage, value, link, key):
    return {"metric": metric, "stage": stage, "value": value, "record": str(link.path), "key": key}


def as_dict(chain, checks, notes, rows):
    """All of it, for `--json`."""
    return {
        "of": chain.identity | {"kind": chain.kind, "seed": chain.seed},
        "numbers": rows,
        "records": [_record(link) for link in chain.whole],
        "checks": [vars(check) for check in checks],
        "notes": notes,
        "agrees": not any(check.agrees is False for check in checks),
    }


def _record(link):
    provenance = link.provenance
    keys = ("started", "seconds", "seed", "device", "threads", "settings", "fingerprints", "versions")
    whole = {key: provenance.get(key) for key in keys}
    return {"name": link.name, "path": str(link.path), "whole": link.problem is None, "problem": link.problem} | whole


def show(console, chain, checks, notes, rows):
    """Print the chain to a rich console: the numbers, every record, what agrees and what does not."""
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
            console.print(f"\ndata set {name}  its record is not among the resources", soft_wrap=True)
    console.print("\nDo they agree?", style="bold")
    for check in checks:
        show_check(console, check)
    for note in notes:
        console.print(f"  note     {note}", soft_wrap=True)
    wrong = any(check.agrees is False for check in checks)
    console.print(tally(checks), style="bold red" if wrong else "bold")


def show_values(console, rows):
    """Print rows of `values`: each number with its record, and its place in it."""
    for row in rows:
        console.print(
            f"  {row['stage']:<10}{row['metric']:<24}{row['value']:.6g}   {row['record']}: {row['key']}", soft_wrap=True
        )


def show_check(console, check):
    """Print one Check in a line."""
    mark, style = MARKS[check.agrees]
    console.print(f"  {mark:<9}", style=style, end="")
    console.print(f"{check.what}: {check.detail}", soft_wrap=True)


def tally(checks):
    """How many of the checks agree, in words."""
    wrong = sum(check.agrees is False for check in checks)
    unknown = sum(check.agrees is None for check in checks)
    return f"{len(checks)} checks: {len(checks) - wrong - unknown} agree, {wrong} differ, {unknown} unknown"


def _show_link(console, title, link):
    state = "checksum agrees" if link.problem is None else "NOT WHOLE"
    console.print(
        f"\n{title}  {link.path}  ({state})", style="bold" if link.problem is None else "bold red", soft_wrap=True
    )
    for key, value in facts(link):
        console.print(f"  {key:<13}{value}", soft_wrap=True)


def facts(link):
    """(key, words) of what a record is read for: when, how long, seed, settings, fingerprints, versions."""
    provenance = link.provenance
    made = [provenance.get("started"), _seconds(provenance.get("seconds")), provenance.get("device")]
    rows = [("made", ", ".join(filter(None, made))), ("seed", provenance.get("seed"))]
    rows += [*_own(link), ("settings", _settings(link)), ("fingerprints", _prints(link))]
    rows += [("versions", ", ".join(f"{k} {v}" for k, v in (provenance.get("versions") or {}).items()))]
    return [(key, value) for key, value in rows if value not in (None, "", [])]


def _seconds(seconds):
    return None if seconds is None else f"{seconds:.1f} s"


def _own(link):
    """What only a record of this kind has."""
    if link.name == "selection" and link.record:
        criterion = link.at("criterion", "words")
        return [("chosen", f"{link.at('candidate')} by {criterion}: {link.at('value'):.6g}")]
    if link.at("roles"):
        rows = ", ".join(f"{role} {known['rows']}" for role, known in link.at("roles").items())
        return [("source", _flat(link.at("source"))), ("rows", rows), ("notes", "; ".join(link.at("notes") or []))]
    if link.name == "model":
        commit = {key: link.at(key) for key in ("revision", "commit") if link.at(key)}
        return [("source", _flat((link.at("source") or {}) | commit)), ("checkpoint", link.at("path"))]
    return [("origin", link.at("origin"))]


def _settings(link):
    settings = link.provenance.get("settings") or {}
    kind = "training" if link.name in ("training", "arm") else "evaluation" if "zero_shot" in settings else None
    return _flat({key: settings[key] for key in MATTER.get(kind, settings) if key in settings})


def _prints(link):
    prints = link.fingerprints or {"weights": link.at("weights_fingerprint")}
    prints = roles_of(link) or prints
    return ", ".join(_print(name, value) for name, value in prints.items() if value)


def _print(name, value):
    if isinstance(value, dict):
        return f"{name} ({', '.join(_print(*one) for one in value.items() if one[1])})"
    return f"{name} {short(value)}"


def _flat(value):
    """Nested settings in one line, without what is not set."""
    if isinstance(value, dict):
        inside = ((key, _flat(one)) for key, one in value.items() if one not in (None, {}, []))
        return ", ".join(f"{key} ({said})" if ", " in said else f"{key} {said}" for key, said in inside)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
