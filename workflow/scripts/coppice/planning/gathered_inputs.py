"""What lets Snakemake plan a study of ten thousand jobs: answers given once, not for every job; files named together.

A gathered file stands for the files that many jobs rest on. Snakemake makes a missing file only for a job that has it
as an input, so a gathered file that names a missing one has to go before the plan is made.
"""

import functools
import gc
import inspect
from pathlib import Path

from coppice.core import fingerprints, records


def plan_quickly():
    """Have no time go by in collecting garbage that is none, and in `smart_open.parse_uri`, which builds a class for
    every answer and is asked four times a job where its script lies."""
    import smart_open  # a dependency of Snakemake's own

    gc.set_threshold(100_000, 50, 100)
    if not hasattr(smart_open.parse_uri, "cache_info"):
        smart_open.parse_uri = functools.cache(smart_open.parse_uri)


def with_parameters(function):
    """`function` of wildcards with its parameters at hand: Snakemake asks for them three times a job."""
    from snakemake.common import overwrite_function_params  # which jobs have no use for

    overwrite_function_params(function, inspect.signature(function).parameters)
    return function


def of_model(value):
    """An input or parameter that is `value(model)`: worked out once a model, not once a job."""
    once = functools.cache(value)
    return with_parameters(lambda wildcards: once(wildcards.model))


def gather(paths, output):
    """Write the record {files: path -> digest} of `paths`: it changes with what they say, not with when it was made."""
    records.write(output, {"files": {str(path): _digest(Path(path)) for path in paths}})


def _digest(path):
    """Of a record without its provenance, so that the same rows or scores made again are the same."""
    if path.suffix != ".json":
        return fingerprints.content_digest(path)
    return records.digest({key: value for key, value in records.read(path).items() if key != "provenance"})


def forget_stale(folder):
    """Remove the gathered files in `folder` that name a file which is not there; returns them. No job reads them."""
    stale = [path for path in Path(folder).rglob("*.json") if not _is_current(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _is_current(path):
    try:
        return all(Path(name).exists() for name in records.read(path)["files"])
    except (records.RecordError, KeyError):
        return True
