"""Classify pictures without training: by the class whose name, written into prompt templates, lies nearest.

As in CLIP, the normalized embeddings of a class's prompts are averaged and normalized again. The label is right among
the first classes if fewer other classes are at least as near: a tie counts as wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from coppice import models
from coppice.core.aliases import Record
from coppice.core.errors import DataError
from coppice.stats import retrieval_metrics

from . import retrieval

if TYPE_CHECKING:
    from coppice.data.row_sources import RowSource
    from coppice.models.kinds import LoadedModel
    from coppice.study.settings.sections.evaluate import Classification

    from .parts import Computed

PROTOCOL = 1  # increase it if a change of method makes measured ranks obsolete
ROWS = ("image-label",)
DEPTHS = (1, 5)


def labels_of(source: RowSource) -> list[str]:
    """Return the label of each row. Raise DataError if a row has none."""
    found = []
    for index, row in enumerate(source.rows):
        label = str(row["label"]).strip() if row["label"] is not None else ""
        if not label:
            raise DataError(f"dataset {source.name}, row {index}: its label is empty. Fill it in, or remove the row.")
        found.append(label)
    return found


def measure(model: LoadedModel, reader: models.Reader, source: RowSource, settings: Classification) -> Computed:
    """Return ({candidates}, a sample {doc_id, doc_hash, label, prediction, rank} per row).

    Args:
        model: a dual encoder in evaluation mode.
        reader: its reader.
        source: rows of pictures with labels.
        settings: the section `evaluate.classification`, with names and no file as classes. Null means the labels that
            occur, in alphabetical order.

    Raises:
        DataError: a row's label is not one of the classes, or there is only one class.
    """
    labels = labels_of(source)
    classes = settings.classes or sorted(set(labels))
    labels = labels[: settings.limit]
    if len(classes) < 2:
        raise DataError(
            f"dataset {source.name}: all rows have the label '{classes[0]}'. List the classes in "
            "evaluate.classification.classes."
        )
    place = {name: number for number, name in enumerate(classes)}
    unknown = next((index for index, label in enumerate(labels) if label not in place), None)
    if unknown is not None:
        raise DataError(
            f"dataset {source.name}, row {unknown}: its label '{labels[unknown]}' is not one of the {len(classes)} "
            "classes of evaluate.classification.classes. Add it there, or correct the row."
        )
    pictures = [source.to_learn(index)[0].pictures[0] for index in range(len(labels))]
    similarity = retrieval.embedded(model, reader, pictures=pictures) @ heads(model, reader, classes, settings).T
    right = numpy.zeros(similarity.shape, dtype=bool)
    right[numpy.arange(len(labels)), [place[label] for label in labels]] = True
    ranks, nearest = retrieval_metrics.ranks(similarity, right), similarity.argmax(axis=1)
    samples = [
        {
            "doc_id": index,
            "doc_hash": hashlib.sha256(f"{label} {picture.sha256}".encode()).hexdigest(),
            "label": label,
            "prediction": classes[nearest[index]],
            "rank": int(ranks[index]),
        }
        for index, (label, picture) in enumerate(zip(labels, pictures, strict=True))
    ]
    return {"candidates": len(classes)}, samples


def heads(model: LoadedModel, reader: models.Reader, classes: Sequence[str], settings: Classification) -> numpy.ndarray:
    """Return the embedding of each class [classes, width]: the mean over the templates, of length 1."""
    prompts = [template.replace("{}", name) for name in classes for template in settings.templates]
    every = retrieval.embedded(model, reader, texts=prompts).reshape(len(classes), len(settings.templates), -1)
    mean = every.mean(axis=1)
    return mean / numpy.linalg.norm(mean, axis=1, keepdims=True)


def results(
    facts: Record, samples: Sequence[Record], settings: Classification
) -> tuple[dict[str, Record], list[Record]]:
    """Return (section -> {value, n, candidates, chance, templates}, the samples with a column for each depth)."""
    ranks, one = numpy.array([row["rank"] for row in samples]), numpy.ones(len(samples), dtype=int)
    rows, sections = [dict(row) for row in samples], {}
    for depth in DEPTHS:
        known = {"candidates": facts["candidates"], "templates": list(settings.templates)}
        known["chance"] = retrieval_metrics.chance(one, facts["candidates"], depth)
        value = retrieval_metrics.recall(ranks, depth)
        sections[f"top{depth}"] = {"value": value, "n": len(rows)} | known
        for row in rows:
            row[f"top{depth}"] = int(row["rank"] <= depth)
    return sections, rows
