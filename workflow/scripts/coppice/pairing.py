"""Evaluations of several models paired item by item and window by window, for statistics that need pairs."""

from pathlib import Path

from . import records
from .errors import CoppiceError


def right_and_wrong(folders, task, remedy):
    """Arrays [items] of 1.0 (right) and 0.0 (wrong), one for each evaluation folder, over the same items in order.

    CoppiceError, ending in `remedy`, where the evaluations were not of the same items.
    """
    import pandas

    frames = [pandas.read_parquet(Path(folder) / "samples" / f"{task}.parquet") for folder in folders]
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
