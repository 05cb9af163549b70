"""Evaluations of several models paired item by item and window by window, for statistics that need pairs.

An evaluation's samples lie in `samples/{task}.parquet` beside its `evaluation_results.json`, which has their digests:
the workflow tracks that record alone.
"""

from pathlib import Path

from . import fingerprints, records
from .errors import CoppiceError


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
    """The path of a task's samples, once they are found to be those of the record beside them; else CoppiceError."""
    record, path = Path(folder) / "evaluation_results.json", Path(folder) / "samples" / f"{task}.parquet"
    remedy = f"delete {record} and run snakemake again, which computes nothing anew that is still in .parts"
    if not path.is_file():
        raise CoppiceError(f"{path}: is missing: {remedy}")
    if fingerprints.content_digest(path) != records.read(record).get("samples", {}).get(task):
        raise CoppiceError(f"{path}: is not the file that its evaluation wrote: {remedy}")
    return path


def right_and_wrong(folders, task, remedy):
    """Arrays [items] of 1.0 (right) and 0.0 (wrong), one for each evaluation folder, over the same items in order.

    CoppiceError, ending in `remedy`, where the evaluations were not of the same items.
    """
    import pandas

    frames = [pandas.read_parquet(samples_file(folder, task)) for folder in folders]
    frames = [frame.set_index("doc_id").sort_index() for frame in frames]
    if any(list(frame["doc_hash"]) != list(frames[0]["doc_hash"]) for frame in frames):
        raise CoppiceError(f"task {task}: the models were scored on different items: {remedy}")
    return [frame["correct"].to_numpy(dtype=float) for frame in frames]


def window_losses(folders, text, remedy):
    """(losses [models, windows] in nats a token, tokens [windows]) on a text; CoppiceError as above."""
    texts = [records.read(Path(folder) / "ppl_results.json")["perplexity"][text]["window_losses"] for folder in folders]
    counts = [[window["tokens"] for window in windows] for windows in texts]
    if any(count != counts[0] for count in counts):
        raise CoppiceError(f"perplexity on {text}: the models were measured over different windows: {remedy}")
    return [[window["nll_per_token"] for window in windows] for windows in texts], counts[0]
