"""Evaluations of several models paired item by item and window by window, for statistics that need pairs.

An evaluation's samples lie in `samples/{task}.parquet` beside its `evaluation_results.json`, which has their digests:
the workflow tracks that record alone.
"""

from pathlib import Path

from coppice.core import fingerprints, records
from coppice.core.errors import CoppiceError


class NotPaired(CoppiceError):
    """Evaluations that were not of the same items or windows."""


def write_samples(folder, samples):
    """Write the samples of every task (task -> list of dicts) in place of what was there; returns task -> digest."""
    import pandas

    folder = _samples_of(folder, samples)
    for task, rows in samples.items():
        with records.atomic(folder / f"{task}.parquet", "wb") as file:
            pandas.DataFrame(rows).to_parquet(file, index=False)
    return {task: fingerprints.content_digest(folder / f"{task}.parquet") for task in samples}


def copy_samples(source, folder, tasks):
    """Copy the samples of `tasks` from the evaluation in `source`, in place of what was there."""
    target = _samples_of(folder, tasks)
    for task in tasks:
        records.copy(samples_file(source, task), target / f"{task}.parquet")


def _samples_of(folder, tasks):
    """The folder of an evaluation's samples, rid of tasks that are not its own any more."""
    folder = Path(folder) / "samples"
    for stale in folder.glob("*.parquet"):
        if stale.stem not in tasks:
            stale.unlink()
    return folder


def samples_file(folder, task):
    """The path of a task's samples, once they are found to be those of the record beside them; else RecordError."""
    record, path = Path(folder) / "evaluation_results.json", Path(folder) / "samples" / f"{task}.parquet"
    remedy = _remedy(record)
    if not path.is_file():
        raise records.RecordError(f"{path}: is missing: {remedy}")
    if fingerprints.content_digest(path) != records.read(record).get("samples", {}).get(task):
        raise records.RecordError(f"{path}: is not the file that its evaluation wrote: {remedy}")
    return path


def _remedy(record):
    return f"delete {record} and run snakemake again, which computes nothing anew that is still in .parts"


def samples(folder, task, columns=None):
    """The arrow table of a task's items in an evaluation's `folder`, by `doc_id`, of those `columns` that it has.

    RecordError where the file is missing, or not as the evaluation's record says that it was written.
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


def right_and_wrong(folders, task, remedy):
    """Arrays [items] of 1.0 (right) and 0.0 (wrong), one for each evaluation folder, over the same items in order.

    NotPaired, ending in `remedy`, where the evaluations were not of the same items.
    """
    tables = [samples(folder, task, ("doc_id", "doc_hash", "correct")) for folder in folders]
    if not all(table["doc_hash"].equals(tables[0]["doc_hash"]) for table in tables):
        raise NotPaired(f"task {task}: the models were scored on different items: {remedy}")
    return [table["correct"].to_numpy().astype(float) for table in tables]


def losses(folder):
    """The record of the losses in an evaluation's `folder`; RecordError where it is not of the evaluation beside it."""
    record, path = Path(folder) / "evaluation_results.json", Path(folder) / "ppl_results.json"
    of, found = records.read(record), records.read(path)
    same = of["provenance"]["fingerprints"] == found["provenance"]["fingerprints"]
    values = [{name: text["value"] for name, text in one["perplexity"].items()} for one in (of, found)]
    if not same or values[0] != values[1]:
        raise records.RecordError(f"{path}: is not of the evaluation beside it: {_remedy(record)}")
    return found


def window_losses(folders, text, remedy):
    """(losses [models, windows] in nats a token, tokens [windows]) on a text; NotPaired as above."""
    texts = [losses(folder)["perplexity"][text]["window_losses"] for folder in folders]
    counts = [[window["tokens"] for window in windows] for windows in texts]
    if any(count != counts[0] for count in counts):
        raise NotPaired(f"perplexity on {text}: the models were measured over different windows: {remedy}")
    return [[window["nll_per_token"] for window in windows] for windows in texts], counts[0]
