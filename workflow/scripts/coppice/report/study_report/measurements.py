"""Collect what the answers are computed from: correctness per item, and loss per window of text, of every model."""

from dataclasses import dataclass, field

import numpy

from coppice.core import records
from coppice.stats import across_models, stored_samples

from .study_records import STAGES

SHOWN_ITEMS = 3  # changed items kept per task and direction
ITEM_COLUMNS = ("doc_id", "doc_hash", "correct", "prediction", "target")
TEXT_COLUMNS = ("question", "choices")


@dataclass
class Measurements:
    """The measurements of all compared pairs.

    Columns of a `Means` are (model, "dense"), (model, config, "pruned") and (model, config, "finetuned").

    Attributes:
        accuracy: `Means` over the items of all tasks, or None without any.
        losses: text -> `Means` over windows, in nats per token.
        changed: (model, config) -> task -> {gained, lost} -> items whose answer changed.
        notes: sentences that say which samples or losses were left out, and why.
    """

    accuracy: across_models.Means | None = None
    losses: dict = field(default_factory=dict)
    changed: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)


def gather(study):
    """Return the `Measurements` of all compared pairs of a `Study`."""
    measurements = Measurements()
    columns = _columns(study)
    measurements.accuracy = _accuracy(study, columns, measurements)
    for metric in study.metrics:
        if not metric.is_accuracy:
            text = metric.key.removeprefix("ppl.")
            blocks = [
                block for model in study.models if (block := _losses(study, model, text, measurements)) is not None
            ]
            if blocks:
                measurements.losses[text] = across_models.side_by_side(blocks)
    return measurements


def column(model, config, stage):
    """Return the name of a column. All configs of a model share its dense column."""
    return (model, "dense") if stage == "dense" else (model, config, stage)


def _columns(study):
    """Return column name -> folder of its evaluation."""
    return {column(pair.model, pair.config, stage): pair.folders[stage] for pair in study.compared for stage in STAGES}


def _accuracy(study, columns, measurements):
    """Return the `Means` over items, with each task as a stratum; leave out columns that lack a task's items."""
    tasks = study.task_names
    correct = {task: _correct(study, task, columns, measurements) for task in tasks}
    complete = [name for name in columns if all(name in correct[task] for task in tasks)]
    if not tasks or not complete:
        return None
    return across_models.mean_of(
        [across_models.means(complete, numpy.stack([correct[task][name] for name in complete])) for task in tasks]
    )


def _correct(study, task, columns, measurements):
    """Return column name -> array [items], 1 for each correct item of `task`.

    Also fills `measurements.changed` and `measurements.notes`, so that the samples are read only once.
    """
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
                measurements.notes.append(f"{' '.join(name)}: no usable samples of {task} ({error})")
                continue
            # A paired comparison needs the same items in the same order in every column.
            reference = table["doc_hash"] if reference is None else reference
            if not table["doc_hash"].equals(reference):
                measurements.notes.append(
                    f"{' '.join(name)}: {task} was scored on different items than in the first model"
                )
                continue
            found[name] = table["correct"].to_numpy().astype(numpy.float32)
            tables[stage] = table
        if "pruned" in tables and "finetuned" in tables:
            items = _changed(tables["pruned"], tables["finetuned"])
            measurements.changed.setdefault((pair.model, pair.config), {})[task] = items
    return found


def _changed(before, after):
    """Return the first few items that fine-tuning turned right (gained) and that it turned wrong (lost)."""
    right = [table["correct"].to_numpy() > 0.5 for table in (before, after)]
    found = {"gained": ~right[0] & right[1], "lost": right[0] & ~right[1]}
    return {kind: _items(before, after, numpy.flatnonzero(places)[:SHOWN_ITEMS]) for kind, places in found.items()}


def _items(before, after, places):
    """Return items as {doc_id, target, before, after, question, choices}; the text is None if samples lack it.

    before, after: the choice that each model picked.
    """
    rows = zip(before.take(places).to_pylist(), after.take(places).to_pylist(), strict=True)
    return [
        {"doc_id": first["doc_id"], "target": first.get("target")}
        | {"before": first.get("prediction"), "after": second.get("prediction")}
        | {name: first.get(name) for name in TEXT_COLUMNS}
        for first, second in rows
    ]


def _losses(study, model, text, measurements):
    """Return the `Means` of one model's losses on a text, weighted by tokens, or None if it has none."""
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
                measurements.notes.append(f"{' '.join(name)}: no usable window losses on {text}")
                continue
            weights = [window["tokens"] for window in windows]
            rows[name] = [window["nll_per_token"] for window in windows]
    return across_models.means(list(rows), list(rows.values()), weights) if rows else None


def _windows(folder, text):
    """Return the window losses of an evaluation on a text, or None if they are missing or damaged."""
    try:
        return stored_samples.losses(folder)["perplexity"][text]["window_losses"]
    except (records.RecordError, ValueError, KeyError):
        return None
