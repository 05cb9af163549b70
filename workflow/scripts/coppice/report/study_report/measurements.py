"""Collect what the answers are computed from: the value of every metric for each row or window, of every model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from coppice.core import records
from coppice.core.aliases import Record
from coppice.render import formatting
from coppice.stats import across_models, metrics, pairing, stored_samples
from coppice.stats.stored_samples import TextLosses

from .study_records import STAGES, Study

if TYPE_CHECKING:
    import pyarrow

Column = tuple[str, ...]  # (model, "dense") or (model, config, stage)
SHOWN_ITEMS = 3  # changed items kept per task and direction
ITEM_COLUMNS = ("doc_id", "doc_hash", "prediction", "target", "answer", "references", "label")
TEXT_COLUMNS = ("question", "choices")
APART = (
    "models with different tokenizers read different windows, which are taken as independent; an interval over several "
    "of these models may be too narrow"
)


@dataclass
class Measurements:
    """The measurements of all compared pairs.

    Columns of a `Means` are (model, "dense"), (model, config, "pruned") and (model, config, "finetuned").

    Attributes:
        means: `Metric` -> `Means` over rows or windows, in the order of the study's metrics, without those of which
            nothing can be paired. Of a metric that is compared by ratios, these are means of logarithms.
        changed: (model, config) -> task -> {gained, lost} -> items whose answer changed.
        notes: sentences that say which samples or losses were left out, and why.
    """

    means: dict[metrics.Metric, across_models.Means] = field(default_factory=dict)
    changed: dict[tuple[str, str], dict[str, dict[str, list[Record]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def leading(self) -> tuple[metrics.Metric, across_models.Means | None]:
        """The metric that answers the questions, with its `Means`, which is None if there is none."""
        metric, _ = metrics.axes(self.means)
        return metric, self.means.get(metric)

    @property
    def others(self) -> dict[metrics.Metric, across_models.Means]:
        """The other metrics with their `Means`."""
        leading, _ = self.leading
        return {metric: means for metric, means in self.means.items() if metric != leading}


def gather(study: Study) -> Measurements:
    """Return the `Measurements` of all compared pairs of a `Study`."""
    measurements = Measurements()
    for metric in study.metrics:
        gathered = _over_texts if metric.pairing == metrics.WINDOWS else _over_rows
        found = gathered(study, metric, measurements)
        if found is not None:
            measurements.means[metric] = found
    return measurements


def column(model: str, config: str, stage: str) -> Column:
    """Return the name of a column. All configs of a model share its dense column."""
    return (model, "dense") if stage == "dense" else (model, config, stage)


def _columns(study: Study, metric: metrics.Metric) -> dict[Column, Path]:
    """Return column name -> folder of its evaluation, for the pairs that are measured by a metric or its parts."""
    return {
        column(pair.model, pair.config, stage): pair.folders[stage]
        for pair in study.compared
        if metric.part(pair.comparison) is not None
        for stage in STAGES
    }


def _over_rows(study: Study, metric: metrics.Metric, measurements: Measurements) -> across_models.Means | None:
    """Return the `Means` over rows, the parts of a mean being strata; leave out columns that lack a part's rows."""
    columns = _columns(study, metric)
    values = [_rows(study, part, columns, measurements) for part in metrics.parts_of(metric)]
    complete = [name for name in columns if all(name in part for part in values)]
    if not values or not complete:
        return None
    strata = [
        pairing.over_rows(part, [found[name] for name in complete]).means(complete)
        for part, found in zip(metrics.parts_of(metric), values, strict=True)
    ]
    return across_models.mean_of(strata)


def _rows(
    study: Study, metric: metrics.Metric, columns: Mapping[Column, Path], measurements: Measurements
) -> dict[Column, tuple[numpy.ndarray, ...]]:
    """Return column name -> the arrays over rows that `pairing.over_rows` takes of an evaluation.

    Also fills `measurements.changed` and `measurements.notes`, so that the samples are read only once.
    """
    held = pairing.columns(metric)
    wanted = (*ITEM_COLUMNS, *held, *TEXT_COLUMNS)
    found, reference = {}, None
    for pair in study.compared:
        tables = {}
        for stage in STAGES:
            name = column(pair.model, pair.config, stage)
            if name in found or name not in columns:
                continue
            try:
                table = stored_samples.samples(columns[name], metric.samples, wanted)
            except records.RecordError as error:
                measurements.notes.append(f"{' '.join(name)}: no usable samples of {metric.name} ({error})")
                continue
            # A paired comparison needs the same items in the same order in every column.
            reference = table["doc_hash"] if reference is None else reference
            if not table["doc_hash"].equals(reference):
                measurements.notes.append(
                    f"{' '.join(name)}: {metric.name} was scored on different items than in the first model"
                )
                continue
            found[name] = tuple(stored_samples.array(table[one]) for one in held)
            tables[stage] = table
        if _shows_items(metric, tables):
            items = _changed(tables["pruned"], tables["finetuned"], metric.values)
            measurements.changed.setdefault((pair.model, pair.config), {})[metric.name] = items
    return found


def _shows_items(metric: metrics.Metric, tables: Mapping[str, pyarrow.Table]) -> bool:
    """Return whether the items that change can be shown: both tables hold what the models chose or wrote."""
    both = [tables.get(stage) for stage in ("pruned", "finetuned")]
    held = (table is not None and not {"answer", "prediction"}.isdisjoint(table.column_names) for table in both)
    return metric.right_or_wrong and all(held)


def _changed(before: pyarrow.Table, after: pyarrow.Table, column: str) -> dict[str, list[Record]]:
    """Return the first few items that fine-tuning turned right (gained) and that it turned wrong (lost)."""
    right = [table[column].to_numpy() > 0.5 for table in (before, after)]
    found = {"gained": ~right[0] & right[1], "lost": right[0] & ~right[1]}
    return {kind: _items(before, after, numpy.flatnonzero(places)[:SHOWN_ITEMS]) for kind, places in found.items()}


def _items(before: pyarrow.Table, after: pyarrow.Table, places: numpy.ndarray) -> list[Record]:
    """Return items as {doc_id, target, is_written, before, after, question, choices}; None for what samples lack.

    before, after: the choice that each model picked, or what it wrote.
    """
    rows = zip(before.take(places).to_pylist(), after.take(places).to_pylist(), strict=True)
    return [
        {"doc_id": first["doc_id"], "target": _target(first), "is_written": "target" not in first}
        | {"before": _said(first), "after": _said(second)}
        | {name: first.get(name) for name in TEXT_COLUMNS}
        for first, second in rows
    ]


def _target(row: Record) -> object:
    """Return the right answer of a row of samples: one or several texts, a class, or the number of a choice."""
    references = row.get("references")
    return formatting.either(list(references)) if references else row.get("label", row.get("target"))


def _said(row: Record) -> object:
    return row.get("answer", row.get("prediction"))


def _over_texts(study: Study, metric: metrics.Metric, measurements: Measurements) -> across_models.Means | None:
    """Return the `Means` over a text, or None if no model has any.

    Models that were measured over the same documents share them; so do models whose tokenizers cut the text into the
    same windows. Windows that differ are taken as independent, and a note says so.
    """
    groups: dict[Hashable, list[tuple[list[Column], TextLosses]]] = {}
    for model in study.models:
        found = _losses(study, model, metric, measurements)
        if found is None:
            continue
        rows, losses = found[2], found[1]
        windows = tuple(losses.tokens[0]) if losses.unit == stored_samples.WINDOWS else None
        groups.setdefault((rows, len(losses.losses[0]), windows), []).append(found[:2])
    if sum(group[0][1].unit == stored_samples.WINDOWS for group in groups.values()) > 1:
        measurements.notes.append(f"{metric.label}: {APART}")
    blocks = []
    for group in groups.values():
        names = [name for columns, _ in group for name in columns]
        losses = [row for _, found in group for row in found.losses]
        tokens = [row for _, found in group for row in found.tokens]
        _, first = group[0]
        blocks.append(across_models.means(names, losses, tokens, first.unit, first.note))
        note = blocks[-1].resampled({names[0]: 1})["note"]
        if note:
            who = formatting.listed(dict.fromkeys(model for model, *_ in names))
            measurements.notes.append(f"{who}: {metric.label}: {note}")
    return across_models.side_by_side(blocks) if blocks else None


def _losses(
    study: Study, model: str, metric: metrics.Metric, measurements: Measurements
) -> tuple[list[Column], TextLosses, str | None] | None:
    """Return the columns of one model, their losses on a text and the fingerprint of its rows, or None without any."""
    texts: dict[Column, Record] = {}
    losses, rows = None, None
    for pair in study.compared:
        if pair.model != model or metric.part(pair.comparison) is None:
            continue
        for stage in STAGES:
            name = column(model, pair.config, stage)
            if name in texts:
                continue
            try:
                record = stored_samples.losses(pair.folders[stage])
                texts[name] = record["perplexity"][metric.name]
                losses = stored_samples.text_losses(list(texts.values()), metric.name, "they are left out")
                rows = record["provenance"]["fingerprints"].get("datasets", {}).get(metric.name)
            except (records.RecordError, stored_samples.NotPaired, ValueError, KeyError):
                texts.pop(name, None)
                measurements.notes.append(f"{' '.join(name)}: no usable window losses on {metric.name}")
    return (list(texts), losses, rows) if losses else None
