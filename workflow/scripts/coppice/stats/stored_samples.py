"""Pair the stored evaluations of several models item by item and window by window, for statistics that need pairs.

An evaluation's samples lie in `samples/{task}.parquet` beside its `evaluation_results.json`. That record holds their
hashes, because it is the only file that the workflow tracks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coppice.core import fingerprints, mirror, records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CoppiceError

if TYPE_CHECKING:
    import numpy
    import pyarrow

ITEMS, DOCUMENTS, WINDOWS = "items", "documents", "windows"  # what is resampled; windows are in order, and in blocks
OLD = "evaluated before documents were recorded, so blocks of windows are resampled"


class NotPaired(CoppiceError):
    """The evaluations do not have the same items or windows."""


def write_samples(folder: PathLike, samples: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """Write the samples of every task (task -> list of dicts) in place of older ones, and return task -> SHA-256."""
    import pandas

    folder = _samples_of(folder, samples)
    for task, rows in samples.items():
        with records.atomic(folder / f"{task}.parquet", "wb") as file:
            pandas.DataFrame(rows).to_parquet(file, index=False)
    return {task: fingerprints.content_digest(folder / f"{task}.parquet") for task in samples}


def _samples_of(folder: PathLike, tasks: Collection[str]) -> Path:
    """Return the folder of an evaluation's samples, after deleting those of tasks that it no longer has."""
    folder = Path(folder) / "samples"
    for stale in folder.glob("*.parquet"):
        if stale.stem not in tasks:
            stale.unlink()
    return folder


def samples_file(folder: PathLike, task: str) -> Path:
    """Return the path of a task's samples; raise RecordError if they are not those of the record beside them."""
    record, path = Path(folder) / "evaluation_results.json", Path(folder) / "samples" / f"{task}.parquet"
    remedy = _remedy(record)
    if not path.is_file():
        raise records.RecordError(f"{path}: is missing; {remedy}")
    if fingerprints.content_digest(path) != records.read(record).get("samples", {}).get(task):
        raise records.RecordError(f"{path}: changed after its evaluation wrote it; {remedy}")
    return path


def _remedy(record: Path) -> str:
    return f"delete {mirror.origin_of(record)} and run snakemake again, which reuses what is still in .parts"


def samples(folder: PathLike, task: str, columns: Collection[str] | None = None) -> pyarrow.Table:
    """Return an arrow table of a task's items in an evaluation's `folder`, sorted by `doc_id`.

    columns: names to read, None for all; the table leaves out those that the file does not have.

    Raises:
        RecordError: if the file is missing or cannot be read, or if it is not the one that the evaluation wrote.
    """
    import pyarrow
    from pyarrow import parquet

    path = samples_file(folder, task)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            kept = names if columns is None else [name for name in columns if name in names]
            return file.read(columns=kept).sort_by("doc_id").combine_chunks()
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        remedy = _remedy(Path(folder) / "evaluation_results.json")
        raise records.RecordError(f"{path}: cannot be read ({error}); {remedy}") from error


def row_values(
    folders: Sequence[Path], name: str, columns: Sequence[str], remedy: str
) -> list[tuple[numpy.ndarray, ...]]:
    """Return for each evaluation folder the `columns` of the samples `name`, over the same rows in order.

    Raises:
        NotPaired: if the evaluations have different rows; the message ends with `remedy`.
    """
    tables = [samples(folder, name, ("doc_id", "doc_hash", *columns)) for folder in folders]
    if not all(table["doc_hash"].equals(tables[0]["doc_hash"]) for table in tables):
        raise NotPaired(f"{name}: the models were scored on different items; {remedy}")
    return [tuple(array(table[column]) for column in columns) for table in tables]


def array(column: pyarrow.ChunkedArray) -> numpy.ndarray:
    """Return a column of samples as floats, [rows], or [rows, s] if each row has a list of `s` numbers."""
    import numpy

    found = column.to_numpy()
    return numpy.stack(found).astype(float) if found.dtype == object else found.astype(float)


def losses(folder: PathLike) -> Record:
    """Return the record of the losses in an evaluation's `folder`; RecordError if it is another evaluation's."""
    record, path = Path(folder) / "evaluation_results.json", Path(folder) / "ppl_results.json"
    of, found = records.read(record), records.read(path)
    same = of["provenance"]["fingerprints"] == found["provenance"]["fingerprints"]
    values = [{name: text["value"] for name, text in one["perplexity"].items()} for one in (of, found)]
    if not same or values[0] != values[1]:
        raise records.RecordError(f"{path}: does not belong to the evaluation beside it; {_remedy(record)}")
    return found


class TextLosses(NamedTuple):
    """Losses [models, units] of several models on a text, in nats per token, over units that are resampled.

    tokens: [models, units]. A document may have no scored token: windows that no tokenizer fills are left out.
    note: why the units are windows although the text may have documents, or None.
    """

    losses: list[list[float]]
    tokens: list[list[int]]
    unit: str
    note: str | None


def text_losses(texts: Sequence[Record], name: str, remedy: str) -> TextLosses:
    """Return the losses of several models on a text, over its documents if it has several, else over its windows.

    Args:
        texts: what each model's `losses` hold of the text.
        name: of the text, for messages.
        remedy: how an error message ends.

    Raises:
        NotPaired: The models were measured over different windows or documents.
    """
    by_document = [text.get("document_losses") for text in texts]
    old = any("document_losses" not in text for text in texts)
    if all(by_document) and len({len(found) for found in by_document}) == 1:
        units, unit = by_document, DOCUMENTS
    else:
        units, unit = [text["window_losses"] for text in texts], WINDOWS
    tokens = [[one["tokens"] for one in found] for found in units]
    if any(count != tokens[0] for count in tokens):
        raise NotPaired(f"perplexity on {name}: the models were measured over different {unit}; {remedy}")
    return TextLosses([[one["nll_per_token"] for one in found] for found in units], tokens, unit, OLD if old else None)
