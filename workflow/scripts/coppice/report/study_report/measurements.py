"""What the answers rest on: every model's correctness item by item, and every model's loss window by window."""

from dataclasses import dataclass, field

import numpy

from coppice.core import records
from coppice.stats import across_models, stored_samples

from .study_records import STAGES

SHOWN_ITEMS = 3
ITEM_COLUMNS = ("doc_id", "doc_hash", "correct", "prediction", "target")
TEXT_COLUMNS = ("question", "choices")


@dataclass
class Evidence:
    """`accuracy`: Means over items, or None; `losses`: text -> Means of nats a token; `changed`: pair -> task -> items.

    Columns are (model, "dense"), (model, config, "pruned") and (model, config, "finetuned"). `notes` says what could
    not be taken in.
    """

    accuracy: across_models.Means | None = None
    losses: dict = field(default_factory=dict)
    changed: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)


def gather(study):
    """The Evidence of all pairs that were compared."""
    evidence = Evidence()
    columns = _columns(study)
    evidence.accuracy = _accuracy(study, columns, evidence)
    for metric in study.metrics:
        if not metric.is_accuracy:
            text = metric.key.removeprefix("ppl.")
            blocks = [block for model in study.models if (block := _losses(study, model, text, evidence)) is not None]
            if blocks:
                evidence.losses[text] = across_models.beside(blocks)
    return evidence


def column(model, config, stage):
    """The name of a column."""
    return (model, "dense") if stage == "dense" else (model, config, stage)


def _columns(study):
    """Column name -> folder of its evaluation."""
    return {column(pair.model, pair.config, stage): pair.folders[stage] for pair in study.compared for stage in STAGES}


def _accuracy(study, columns, evidence):
    """Means over items: each task is a stratum; a column that lacks a task's items is left out."""
    tasks = study.task_names
    correct = {task: _correct(study, task, columns, evidence) for task in tasks}
    whole = [name for name in columns if all(name in correct[task] for task in tasks)]
    if not tasks or not whole:
        return None
    return across_models.mean_of(
        [across_models.means(whole, numpy.stack([correct[task][name] for name in whole])) for task in tasks]
    )


def _correct(study, task, columns, evidence):
    """Column name -> array [items] of what was right in `task`; notes changed items pair by pair on the way."""
    found, reference = {}, None
    for pair in study.compared:
        tables = {}
        for stage in STAGES:
            name = column(pair.model, pair.config, stage)
            if name in found:
                continue
            try:
                table = stored_samples.samples(columns[name], task, ITEM_COLUMNS + TEXT_COLUMNS)
            except records.RecordError as error:
                evidence.notes.append(f"{' '.join(name)}: no usable samples of {task} ({error})")
                continue
            reference = table["doc_hash"] if reference is None else reference
            if not table["doc_hash"].equals(reference):
                evidence.notes.append(f"{' '.join(name)}: {task} was scored on other items than the first model's")
                continue
            found[name] = table["correct"].to_numpy().astype(numpy.float32)
            tables[stage] = table
        if "pruned" in tables and "finetuned" in tables:
            items = _changed(tables["pruned"], tables["finetuned"])
            evidence.changed.setdefault((pair.model, pair.config), {})[task] = items
    return found


def _changed(before, after):
    """A few items that fine-tuning turned right, and a few that it turned wrong, the first ones of each."""
    right = [table["correct"].to_numpy() > 0.5 for table in (before, after)]
    found = {"gained": ~right[0] & right[1], "lost": right[0] & ~right[1]}
    return {kind: _items(before, after, numpy.flatnonzero(places)[:SHOWN_ITEMS]) for kind, places in found.items()}


def _items(before, after, places):
    """Items as {doc_id, target, before, after}, the last two what was picked, with their text where it was kept."""
    rows = zip(before.take(places).to_pylist(), after.take(places).to_pylist(), strict=True)
    return [
        {"doc_id": first["doc_id"], "target": first.get("target")}
        | {"before": first.get("prediction"), "after": second.get("prediction")}
        | {name: first.get(name) for name in TEXT_COLUMNS}
        for first, second in rows
    ]


def _losses(study, model, text, evidence):
    """The Means of one model's losses on a text; None where there are none."""
    rows, weights = {}, None
    for pair in study.compared:
        if pair.model != model:
            continue
        for stage in STAGES:
            name = column(model, pair.config, stage)
            if name in rows:
                continue
            windows = _windows(pair.folders[stage], text)
            if windows is None or (weights is not None and [w["tokens"] for w in windows] != weights):
                evidence.notes.append(f"{' '.join(name)}: no usable losses by window on {text}")
                continue
            weights = [window["tokens"] for window in windows]
            rows[name] = [window["nll_per_token"] for window in windows]
    return across_models.means(list(rows), list(rows.values()), weights) if rows else None


def _windows(folder, text):
    try:
        return stored_samples.losses(folder)["perplexity"][text]["window_losses"]
    except (records.RecordError, ValueError, KeyError):
        return None
