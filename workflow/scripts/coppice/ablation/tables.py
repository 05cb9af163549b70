"""Build the tables of an ablation's report: cells for the page, and a pandas frame for the CSV file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import Json, Record
from coppice.render import formatting
from coppice.stats import paired_stats
from coppice.stats.metrics import LOSS, Metric, named

from . import formats, measuring
from .reading import Arm

if TYPE_CHECKING:
    import pandas

Table = Record  # {columns, rows} and, for the page, more
Cell = Record  # {text, note, sort}: what is shown, a remark under it, and what the column is sorted by

HEAD = (
    ("arm", "trained parameters", "of all", "on disk", "steps", "tokens", "time", "tokens/s", "peak memory"),
    ("validation loss", "gap to training"),
)
MEANS = (("steps", ""), ("tokens_seen", ""), ("seconds", " s"), ("tokens_per_second", ""))


def arms(found: Sequence[Arm], problems: Mapping[str, Sequence[str]]) -> Table:
    """Return {columns, rows} of all arms: sizes, cost, validation loss and every metric, as means over seeds."""
    metrics = _metrics(found)
    columns = [*HEAD[0], *HEAD[1], *map(formats.label, metrics), "notes"]
    return {"columns": columns, "texts": 1, "rows": [_row(arm, metrics, problems) for arm in found]}


def _metrics(found: Iterable[Arm]) -> list[Metric]:
    measured = next((arm for arm in found if arm.measured("report")), None)
    return formats.metrics(measured) if measured else []


def _row(arm: Arm, metrics: Sequence[Metric], problems: Mapping[str, Sequence[str]]) -> list[Cell]:
    notes = _cell("; ".join(_notes(arm, problems)))
    first = _cell(arm.name, formats.settings(arm))
    if not arm.trained:
        return [first, *(_cell("") for _ in [*HEAD[0][1:], *HEAD[1], *metrics]), notes]
    run = arm.first
    peak, where = formats.memory(arm)
    gaps = [value for value in map(formats.gap, arm.runs.values()) if value is not None]
    gap = sum(gaps) / len(gaps) if gaps else None
    return [
        first,
        _cell(f"{run['trainable_parameters']:,}", sort=run["trainable_parameters"]),
        _cell(f"{run['trainable_percent']:.2f} %", sort=run["trainable_percent"]),
        _cell(formats.size(run["stored_bytes"]), sort=run["stored_bytes"]),
        *(_cell(f"{arm.mean(key):,.0f}{unit}", sort=arm.mean(key)) for key, unit in MEANS),
        _cell(formats.size(peak), where, peak),
        _over_seeds(LOSS, arm.values(LOSS)),
        _cell("" if gap is None else f"{gap:+.3f}", sort=gap),
        *(_over_seeds(one, arm.values(one, "report")) if arm.measured("report") else _cell("") for one in metrics),
        notes,
    ]


def _over_seeds(metric: Metric, values: Sequence[float]) -> Cell:
    found = paired_stats.over_seeds(values)
    note = ""
    if found["n"] == 2:  # with one degree of freedom, the interval of the mean would be useless
        note = " and ".join(formats.value(metric, value) for value in values)
    elif found["interval"]:
        low, high = (formats.value(metric, bound) for bound in found["interval"])
        note = f"{low} to {high}, {found['n']} seeds"
    return _cell(formats.value(metric, found["mean"]), note, found["mean"])


def _notes(arm: Arm, problems: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if arm.unfit:
        yield f"not trained: {arm.unfit}"
    if arm.raced_out:
        rung = arm.raced_out
        yield f"stopped by the race at step {rung['step']} (validation loss {rung['validation_loss']:.4f})"
    if arm.name in problems:
        yield "not compared: see the warning above"
    if arm.trained:
        overfits = formats.overfitting(arm)
        if overfits:
            yield overfits
        yield from formatting.warned({f"seed {seed}": run.get("warnings") or [] for seed, run in arm.runs.items()})
        if arm.first.get("reused_from"):
            yield f"the same training as {arm.first['reused_from']}, reused"


def _cell(text: str, note: str = "", sort: str | float | None = None) -> Cell:
    return {"text": text, "note": note, "sort": text if sort is None else sort}


def differences(found: Sequence[Arm], reference: Arm, losses: bool = True) -> Table:
    """Return {columns, rows} of every arm's difference from the reference, by metric, with p-values and verdicts.

    losses: whether to include the validation loss; a staged ablation has used it up to choose the winners.
    """
    compared = [arm for arm in found if arm.measured("report")] if reference.measured("report") else []
    columns = ["arm", "metric", "difference", "p (Holm)", "by seed", "verdict"]
    rows = list(_of(LOSS, found, reference)) if losses else []
    for metric in formats.metrics(reference) if len(compared) > 1 else []:
        rows += _of(metric, compared, reference)
    return {"columns": columns, "rows": rows}


def _of(metric: Metric, compared: Sequence[Arm], reference: Arm) -> Iterator[list[str]]:
    part = measuring.differences(compared, reference, metric, "report")
    for name, one in part.items():
        seeds = [formats.difference(metric, {"value": value, "interval": None}) for value in one["by_seed"]]
        difference = formats.difference(metric, one)
        note = one["resampled"]["note"]
        verdict = f"{one['verdict']} ({note})" if note else one["verdict"]
        yield [name, formats.label(metric), difference, f"{one['p_holm']:.2g}", ", ".join(seeds), verdict]


def stages(winners: Iterable[Record]) -> Table:
    """Return {columns, rows} of the stages: the winner, the values of all arms, and the runner-up's distance."""
    rows = []
    for winner in winners:
        metric, second = named(winner["choose_by"]["metric"]), winner["runner_up"]
        behind = ""
        if second:
            noise = "within noise" if second["verdict"] == "no clear change" else "beyond noise"
            behind = f"{second['arm']}: {formats.difference(metric, second)}, {noise}"
        values = ", ".join(f"{arm} {formats.value(metric, value)}" for arm, value in winner["values"].items())
        rows.append([winner["stage"], winner["winner"], values, behind])
    return {"columns": ["stage", "winner", "all arms", "runner-up against the winner"], "rows": rows}


def sides(found: Sequence[Arm]) -> Table | None:
    """Return {columns, rows} of full fine-tuning beside the best LoRA arm; None if one of them is missing."""
    full = [arm for arm in found if arm.settings["train"] == "all"]
    adapters = [arm for arm in found if arm.settings["train"] != "all"]
    if not full or not adapters:
        return None
    best = min(adapters, key=lambda arm: arm.value(LOSS))
    shown = [*full, best]
    metrics = _metrics(shown)
    rows = [
        ["trained parameters", *(f"{arm.first['trainable_parameters']:,}" for arm in shown)],
        ["peak memory", *(" ".join([formats.size(formats.memory(arm)[0]), formats.memory(arm)[1]]) for arm in shown)],
        ["tokens/s", *(f"{arm.first['tokens_per_second']:,.0f}" for arm in shown)],
        ["on disk", *(formats.size(arm.first["stored_bytes"]) for arm in shown)],
        ["validation loss", *(formats.value(LOSS, arm.value(LOSS)) for arm in shown)],
        *(
            [formats.label(metric), *(formats.value(metric, arm.value(metric, "report")) for arm in shown)]
            for metric in metrics
            if all(arm.measured("report") for arm in shown)
        ),
    ]
    return {"columns": ["", *(arm.name for arm in full), f"{best.name} (best LoRA arm)"], "rows": rows}


def frame(found: Sequence[Arm], problems: Mapping[str, Sequence[str]]) -> pandas.DataFrame:
    """Return a pandas frame with a row per arm and seed: settings, sizes, cost and every metric, as numbers."""
    import pandas

    metrics, rows = _metrics(found), []
    for arm in found:
        for place, (seed, run) in enumerate(arm.runs.items()):
            row = {
                "arm": arm.name,
                "seed": seed,
                "stage": arm.stage,
                "compared": arm.trained and arm.name not in problems,
            }
            row |= {key: _plain(value) for key, value in arm.settings.items()}
            if arm.trained:
                facts = ("trainable_parameters", "all_parameters", "stored_bytes", "steps", "tokens_seen", "seconds")
                row |= {key: run[key] for key in (*facts, "tokens_per_second", "train_loss", LOSS.key)}
                row |= {"peak_memory_bytes": formats.memory(arm)[0], "gap": formats.gap(run)}
            if arm.measured("report"):
                row |= {metric.key: arm.values(metric, "report")[place] for metric in metrics}
            rows.append(row)
    return pandas.DataFrame(rows)


def _plain(value: Json) -> Json:
    return "+".join(value) if isinstance(value, list) else value
