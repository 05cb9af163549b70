"""Write and read records, the small JSON files that carry results and their provenance.

A record is written atomically (temporary file in the same folder, fsync, rename) and carries a checksum of its own
content, so a reader never accepts half a record or one that was damaged later. NaN and infinity are rejected: a number
that is not finite raises an error where it arises and never reaches a table.
"""

import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .aliases import Json, PathLike, Record
from .disks import partial_name
from .errors import CoppiceError, TransientError
from .json_text import parsed
from .secrets import redacted

SCHEMA_VERSION = 1
NAMES = ("path", "source_path", "repository")  # a redacted value of these would no longer find anything
PACKAGES = ("torch", "transformers", "peft", "datasets", "lm_eval", "tokenizers", "safetensors", "numpy")


class RecordError(CoppiceError):
    """A record is missing, damaged or has another schema version; the message names the file and the remedy."""


class MissingRecord(RecordError, TransientError):
    """A record does not exist, or is not visible yet: network file systems show new files late."""


def canonical(content: Json) -> str:
    """Return the canonical JSON text of `content` (sorted keys, no spaces), from which checksums and keys are made."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(content: Json) -> str:
    """Return the hex SHA-256 of the canonical JSON of `content`."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()


@contextmanager
def atomic(path: PathLike, mode: str = "w") -> Iterator[IO]:
    """Yield a temporary file beside `path`, which replaces `path` only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed below; the rename needs its name
        mode, dir=path.parent, prefix=partial_name(), delete=False, encoding=None if "b" in mode else "utf-8"
    )
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(handle.name, 0o666 & ~_umask())  # temporary files are 0600, but a group shares its results
        os.replace(handle.name, path)
    except BaseException as error:
        Path(handle.name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the error of a full disk names no file
        raise


def copy(source: PathLike, path: PathLike) -> None:
    """Copy the file `source` to `path`, which appears only when it is complete."""
    with open(source, "rb") as content, atomic(path, "wb") as file:
        shutil.copyfileobj(content, file)


def move_in(partial: Path, folder: Path) -> None:
    """Move everything in the folder `partial` into `folder`, where it replaces entries of the same name."""
    as_new_files(partial)
    for path in sorted(partial.iterdir()):
        if path.is_dir():  # some tokenizers save folders, and a rename cannot replace a folder that has content
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    partial.rmdir()


def as_new_files(folder: PathLike) -> None:
    """Give the files in `folder` the permissions of new files: safetensors lets only their owner read weights."""
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write(path: PathLike, record: Record) -> None:
    """Write `record` (a JSON-able dict) to `path`, atomically, with schema version and checksum and without secrets.

    Raises:
        RecordError: if a number is not finite, or if a path or a repository name contains a secret.
    """
    if key := _secret_name(record):
        raise RecordError(
            f"{path}: not written: its {key} seems to contain a secret (a password, a token or the value of an "
            "environment variable such as HF_TOKEN). Rename it or unset that variable."
        )
    content = {"schema_version": SCHEMA_VERSION} | {k: v for k, v in redacted(record).items() if k != "checksum"}
    try:
        checksum = digest(content)
    except ValueError as error:
        raise RecordError(f"{path}: not written: {_not_finite(content)} is not a finite number") from error
    with atomic(path) as file:
        json.dump(content | {"checksum": checksum}, file, indent=1, ensure_ascii=False)
        file.write("\n")


def _secret_name(content: Json, path: str = "") -> str | None:
    """Return the dotted key of the first of `NAMES` whose value contains a secret; None if there is none."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    for key, value in content.items() if isinstance(content, dict) else ():
        here = f"{path}.{key}".lstrip(".")
        if key in NAMES and isinstance(value, str) and redacted(value) != value:
            return here
        if found := _secret_name(value, here):
            return found
    return None


def _not_finite(content: Json, path: str = "") -> str | None:
    """Return the dotted path of the first number in `content` that is not finite; None if all are."""
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        finite = not isinstance(content, float) or abs(content) < float("inf")
        return None if finite else path
    return next((found for key, value in items if (found := _not_finite(value, f"{path}.{key}".lstrip(".")))), None)


def read(path: PathLike, remedy: str = "delete it and run snakemake again") -> Record:
    """Return the record at `path` after checking its schema version and its checksum.

    Raises:
        MissingRecord: if the file does not exist.
        RecordError: if the record cannot be trusted; the message ends with `remedy`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingRecord(f"{path}: this record does not exist. Run `snakemake {path}` to make it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error}); {remedy}") from error
    try:
        record = parsed(text)
        checksum = record.pop("checksum")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: is incomplete or is not a record; {remedy}") from error
    if record.get("schema_version") != SCHEMA_VERSION:
        version = record.get("schema_version")
        raise RecordError(f"{path}: has schema version {version} instead of {SCHEMA_VERSION}; {remedy}")
    if not _matches(record, checksum):
        raise RecordError(f"{path}: was changed after it was written (its checksum differs); {remedy}")
    return record


def _matches(record: Record, checksum: str) -> bool:
    try:
        return digest(record) == checksum
    except ValueError:  # it contains a number that is not finite, which `write` never writes
        return False


class Clock:
    """Measure the wall time and the peak memory of a job, from its creation until `provenance` is called."""

    def __init__(self) -> None:
        """Start the clock."""
        self.started = time.time()

    def provenance(self, settings: Json = None, seed: int | None = None, **fingerprints: Json) -> Record:
        """Return what a job's numbers depend on: settings, seed, fingerprints, versions, device, time and memory.

        settings: as resolved; fingerprints: of weights, data and code, by name. Time is in seconds, memory in bytes.
        """
        return {
            "settings": settings,
            "seed": seed,
            "fingerprints": fingerprints,
            "versions": versions(),
            **running(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 3),
        }


def running() -> Record:
    """Return {device, threads, peak_memory_bytes} of this process so far."""
    return {"device": device_name(), "threads": _threads(), "peak_memory_bytes": peak_memory()}


def versions() -> dict[str, str]:
    """Return the versions of Python, Coppice and the packages that affect results, if they are installed."""
    import importlib.metadata

    from coppice import __version__

    found = {"python": platform.python_version(), "coppice": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> dict[str, int]:
    """Return {host, gpu}: peak resident bytes of this process, and the peak allocated on any one GPU if it has one."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux reports kilobytes
    torch = sys.modules.get("torch")  # a job that has not imported torch (seconds) has not used a GPU
    if torch is not None and torch.cuda.is_available():
        peak["gpu"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return peak


def device_name() -> str:
    """Return the name of the device that torch uses in this process; the host's CPU if torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"cpu ({platform.machine()})"


def _threads() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else 1
