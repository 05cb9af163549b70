"""Measure how well a dual encoder finds the captions of pictures among all captions, and the pictures of captions.

As usual for captioned pictures, a picture has found one of its captions if any of them is among the first, and each
caption is a query of its own. A caption that several pictures have is right for all of them. Recall depends on the
number of candidates, which is recorded with the recall that random order would give.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from coppice import models
from coppice.core import logs
from coppice.core.aliases import Record
from coppice.core.errors import DataError
from coppice.models import kinds
from coppice.stats import retrieval_metrics

if TYPE_CHECKING:
    from coppice.data.row_sources import RowSource
    from coppice.models.kinds import LoadedModel
    from coppice.models.rows import Picture

    from .parts import Computed

logger = logging.getLogger("coppice.evaluation")

PROTOCOL = 1  # increase it if a change of method makes measured ranks obsolete
ROWS = ("image-caption",)
AT_ONCE = 64  # texts or pictures that are embedded together
DEPTHS = retrieval_metrics.DEPTHS


@dataclass(frozen=True)
class Gallery:
    """Pictures and captions. A caption that a picture has twice counts once.

    Attributes:
        pictures: distinct pictures, in the order of the rows.
        captions: those of all pictures, one after another.
        owners: the picture of each caption, [captions].
    """

    pictures: Sequence[Picture]
    captions: Sequence[str]
    owners: Sequence[int]


def gallery(source: RowSource, limit: int | None) -> Gallery:
    """Return the first `limit` pictures of the rows, with all their captions.

    Raises:
        DataError: there are fewer than two pictures, or a row has several.
    """
    pictures: dict[str, Picture] = {}
    captions: dict[str, dict[str, None]] = {}
    for index in range(len(source.rows)):
        row = source.to_ask(index)
        if len(row.pictures) != 1:
            raise DataError(
                f"dataset {source.name}, row {index}: has {len(row.pictures)} pictures, but retrieval needs one a row. "
                "Split the row."
            )
        (picture,) = row.pictures
        if picture.sha256 in pictures or limit is None or len(pictures) < limit:
            pictures.setdefault(picture.sha256, picture)
            captions.setdefault(picture.sha256, {}).update(dict.fromkeys(row.references))
    if len(pictures) < 2:
        raise DataError(f"dataset {source.name}: retrieval needs at least two pictures. Add rows, or raise the limit.")
    owned = [(place, caption) for place, own in enumerate(captions.values()) for caption in own]
    return Gallery(list(pictures.values()), [caption for _, caption in owned], [place for place, _ in owned])


def measure(model: LoadedModel, reader: models.Reader, source: RowSource, limit: int | None) -> Computed:
    """Return ({direction: {candidates, chance by depth}}, a sample {direction, doc_id, doc_hash, rank} per query).

    Args:
        model: a dual encoder in evaluation mode.
        reader: its reader.
        source: rows of pictures with captions.
        limit: the most pictures, or None.
    """
    found = gallery(source, limit)
    pictures = embedded(model, reader, pictures=found.pictures)
    distinct = {caption: place for place, caption in enumerate(dict.fromkeys(found.captions))}
    texts = embedded(model, reader, texts=list(distinct))
    copies = [distinct[caption] for caption in found.captions]
    owners = [found.pictures[place].sha256 for place in found.owners]
    names = {
        retrieval_metrics.TO_TEXT: [picture.sha256 for picture in found.pictures],
        retrieval_metrics.TO_IMAGE: [
            f"{caption} {owner}" for caption, owner in zip(found.captions, owners, strict=True)
        ],
    }
    facts, samples = {}, []
    for direction, (ranks, right) in retrieval_metrics.both_ways(pictures, texts, found.owners, copies).items():
        items = len(pictures) if direction == retrieval_metrics.TO_IMAGE else len(found.captions)
        chances = {str(depth): retrieval_metrics.chance(right, items, depth) for depth in DEPTHS}
        facts[direction] = {"candidates": items, "chance": chances}
        for place, (name, rank) in enumerate(zip(names[direction], ranks, strict=True)):
            digest = hashlib.sha256(name.encode()).hexdigest()
            samples.append({"direction": direction, "doc_id": place, "doc_hash": digest, "rank": int(rank)})
    return facts, samples


def results(facts: Record, samples: Sequence[Record]) -> tuple[dict[str, Record], dict[str, list[Record]]]:
    """Return (section -> {value, n, candidates, chance}, direction -> its samples), from what `measure` returns."""
    by_direction = {name: [row for row in samples if row["direction"] == name] for name in facts}
    sections = {}
    for name, rows in by_direction.items():
        ranks = numpy.array([row["rank"] for row in rows])
        for depth in DEPTHS:
            known = {"candidates": facts[name]["candidates"], "chance": facts[name]["chance"][str(depth)]}
            value = retrieval_metrics.recall(ranks, depth)
            sections[f"{name}_r{depth}"] = {"value": value, "n": len(rows)} | known
    kept = ("doc_id", "doc_hash", "rank")
    return sections, {name: [{key: row[key] for key in kept} for row in rows] for name, rows in by_direction.items()}


def embedded(
    model: LoadedModel,
    reader: models.Reader,
    texts: Sequence[str] | None = None,
    pictures: Sequence[Picture] | None = None,
) -> numpy.ndarray:
    """Return the embeddings [n, width] of texts or of pictures, each of length 1.

    Raises:
        CheckpointError: an embedding is not finite.
    """
    kind, given = kinds.of(model.config), texts if pictures is None else pictures
    parts, what = [], "texts" if pictures is None else "pictures"
    for part in logs.progress(list(_slices(len(given), AT_ONCE)), what, unit="batch"):
        parts.append(kind.embeddings(model, reader, **{what: given[part]}).numpy())
    found = numpy.concatenate(parts)
    if not numpy.isfinite(found).all():
        raise models.broken(model, f"embeddings of {what} are not finite numbers")
    return found


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
