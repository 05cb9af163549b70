"""Make planning fast for studies of ten thousand jobs: cached input functions, and one gathered file for many inputs.

A gathered file lists the inputs that many jobs share, with their digests, so that each job declares one input instead
of dozens. Snakemake makes a missing file only if some job declares it as an input. A gathered file that lists a missing
file must therefore be deleted before planning (`forget_stale`): the job that writes it again declares the missing file.
"""

import functools
import gc
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike

Function = TypeVar("Function", bound=Callable)
Value = TypeVar("Value")


def plan_quickly() -> None:
    """Speed up Snakemake's planning: run the garbage collector less often, and cache `smart_open.parse_uri`.

    Snakemake calls `parse_uri` four times per job for the script's path, and each call builds a class.
    """
    import smart_open  # a dependency of Snakemake

    gc.set_threshold(100_000, 50, 100)
    if not hasattr(smart_open.parse_uri, "cache_info"):
        smart_open.parse_uri = functools.cache(smart_open.parse_uri)


def with_parameters(function: Function) -> Function:
    """Store a function's parameters on it and return it, because Snakemake inspects them three times per job."""
    from snakemake.common import overwrite_function_params  # imported here because jobs do not need Snakemake

    overwrite_function_params(function, inspect.signature(function).parameters)
    return function


def of_model(value: Callable[[str], Value]) -> Callable[..., Value]:
    """Return an input or parameter function for `value(model)`, computed once per model instead of once per job."""
    once = functools.cache(value)
    return with_parameters(lambda wildcards: once(wildcards.model))


def gather(paths: Iterable[PathLike], output: PathLike) -> None:
    """Write the record {files: path -> digest} of `paths`. It depends on their contents, not on their time stamps."""
    records.write(output, {"files": {str(path): _digest(Path(path)) for path in paths}})


def _digest(path: Path) -> str:
    """Return a file's digest. A record's provenance is left out, so that rows or scores made again compare equal."""
    if path.suffix != ".json":
        return fingerprints.content_digest(path)
    return records.digest({key: value for key, value in records.read(path).items() if key != "provenance"})


def forget_stale(folder: PathLike) -> list[Path]:
    """Delete the gathered files in `folder` that list a missing file, and return their paths."""
    stale = [path for path in Path(folder).rglob("*.json") if not _is_current(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _is_current(path: Path) -> bool:
    try:
        return all(Path(name).exists() for name in records.read(path)["files"])
    except (records.RecordError, KeyError):
        return True
