"""Have a model answer the rows of a data set, and measure the answers against the rows' references.

A row's samples hold its answer, its references, and the negative log-likelihood of all references after the row's
question (teacher forcing, by the engine that trains the kind of model). Metrics are computed from these, so another
choice of metrics generates no answer again.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from coppice import models
from coppice.core import logs
from coppice.core.aliases import Record
from coppice.data.datasets import row_text
from coppice.data.row_sources import RowSource
from coppice.models import kinds
from coppice.models.kinds import Decoding
from coppice.models.rows import Row
from coppice.stats import text_metrics
from coppice.study.settings.sections.evaluate import Answers

from . import programs

if TYPE_CHECKING:
    from coppice.models.kinds import LoadedModel

    from .parts import Computed

logger = logging.getLogger("coppice.evaluation")

PROTOCOL = 1  # increase it if a change of method makes measured answers obsolete
TOKENS = 8192  # of references at a time


def decoding_of(settings: Answers, seed: int) -> Decoding:
    """Return how answers are generated. The seed counts only if tokens are drawn at random."""
    drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": seed} if settings.sample else {}
    return Decoding(
        beams=settings.beams,
        sample=settings.sample,
        new_tokens=settings.new_tokens,
        batch_size=settings.batch_size,
        stop=tuple(settings.stop or ()),
        **drawn,
    )


def facts_of(decoding: Decoding) -> Record:
    """Return what decides answers, for records. The batch size decides only which random numbers a row gets."""
    found = asdict(decoding) | {"stop": list(decoding.stop)}
    without = {"strip"} if decoding.sample else {"strip", "batch_size"}  # the kind of rows decides what is stripped
    return {key: value for key, value in found.items() if key not in without}


def measure(
    model: LoadedModel, reader: models.Reader, source: RowSource, how: Decoding, limit: int | None, count: int = 1
) -> Computed:
    """Return ({row_kind}, samples): what the model answers to each row, with the likelihood of its references.

    Args:
        model: in evaluation mode.
        reader: its reader.
        source: the rows.
        how: how answers are generated.
        limit: the most rows, or None.
        count: the number of answers to each row that asks for a program.
    """
    kind, rows = kinds.of(model.config), source.asked(limit)
    count, how = (count, replace(how, strip=False)) if source.kind == programs.ROWS else (1, how)
    written = kind.answers(model, reader, [row for row in rows for _ in range(count)], how)
    several = [written[start : start + count] for start in range(0, len(written), count)]
    likelihoods = reference_losses(model, reader, source, len(rows))
    samples = [
        {"doc_id": index, "doc_hash": _digest(row), "answer": answers[0], "references": list(row.references)}
        | ({"answers": answers} if source.kind == programs.ROWS else {})
        | losses
        for index, (row, answers, losses) in enumerate(zip(rows, several, likelihoods, strict=True))
    ]
    return {"row_kind": source.kind}, samples


def _digest(row: Row) -> str:
    """Return a digest of a row's columns, by which the rows of two evaluations are paired."""
    return hashlib.sha256(row_text(row.content).encode()).hexdigest()


def reference_losses(model: LoadedModel, reader: models.Reader, source: RowSource, count: int) -> list[Record]:
    """Return {answer_nll, answer_tokens} of each of the first `count` rows: in nats, over all of its references."""
    import torch

    kind = kinds.of(model.config)
    length = models.known_context_length(model) or TOKENS
    learned = [source.to_learn(index) for index in range(count)]
    made = iter(kind.examples([row for rows in learned for row in rows], reader, length, False))
    examples = [[example for _ in rows for example in next(made)] for rows in learned]
    engine, found = kind.engine(model, TOKENS), []
    with torch.no_grad():
        for own in logs.progress(examples, "references", unit="row"):
            losses = [engine.summed_loss(micro).double().item() for micro in engine.micro_batches(own)] if own else []
            found.append({"answer_nll": math.fsum(losses), "answer_tokens": kind.targets(own)})
    return found


def scored(samples: Sequence[Record], row_kind: str, metrics: Iterable[str] | None) -> tuple[Record, list[Record]]:
    """Return (section -> {value, n, ...}, the samples with a column for each metric).

    Args:
        samples: as from `measure`.
        row_kind: the kind of the rows.
        metrics: which to compute; None takes those of the kind of rows.
    """
    form, found = text_metrics.form_of(row_kind), {}
    # a stored part gives lists as arrays
    rows = [{**row, "references": list(row["references"])} for row in samples]
    for name in text_metrics.METRICS_OF_ROWS[form] if metrics is None else metrics:
        scores = text_metrics.score(name, [row["answer"] for row in rows], [row["references"] for row in rows], form)
        found[name] = {"value": scores.value, "n": len(rows)} | scores.facts
        rows = [row | {name: value} for row, value in zip(rows, scores.rows, strict=True)]
    if tokens := sum(row["answer_tokens"] for row in rows):
        mean = math.fsum(row["answer_nll"] for row in rows) / tokens
        found["answer_ppl"] = {"value": math.exp(mean), "n": len(rows), "tokens": int(tokens)}
    return found, rows
