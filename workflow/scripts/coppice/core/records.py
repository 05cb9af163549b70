"""The one place that writes and reads records: small JSON files that carry results and their provenance.

A record is written atomically (temporary file in the same folder, fsync, rename) and carries a checksum of its own
content, so that a reader never takes half a record, or one that was damaged later, for a whole one. NaN and infinity
are refused: a number that is not one is an error where it arises, never a value in a table.
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
from contextlib import contextmanager
from pathlib import Path

from .disks import partial_name
from .errors import CoppiceError, TransientError
from .json_text import parsed
from .secrets import redacted

SCHEMA_VERSION = 1
NAMES = ("path", "source_path", "repository")  # what is found by them would not be found by a redacted one
PACKAGES = ("torch", "transformers", "peft", "datasets", "lm_eval", "tokenizers", "safetensors", "numpy")


class RecordError(CoppiceError):
    """A record is missing, damaged or of another schema; the message names the file and the remedy."""


class MissingRecord(RecordError, TransientError):
    """A record is not there, or not to be seen yet: file systems of a network show files late."""


def canonical(content):
    """Canonical JSON text of `content`: sorted keys, no spaces; what checksums and settings keys are made of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(content):
    """Hex SHA-256 of the canonical JSON of `content`."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()


@contextmanager
def atomic(path, mode="w"):
    """A file object beside `path` that takes its place only if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed below, the name is needed for the rename
        mode, dir=path.parent, prefix=partial_name(), delete=False, encoding=None if "b" in mode else "utf-8"
    )
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(handle.name, 0o666 & ~_umask())  # temporary files are 0600: others of the group read results too
        os.replace(handle.name, path)
    except BaseException as error:
        Path(handle.name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a disk that is full does not say for which file
        raise


def copy(source, path):
    """Copy a file to `path`, which it takes only when it is whole."""
    with open(source, "rb") as content, atomic(path, "wb") as file:
        shutil.copyfileobj(content, file)


def move_in(partial, folder):
    """Move what lies in the folder `partial` into `folder`, where it replaces what has the same name."""
    as_new_files(partial)
    for path in sorted(partial.iterdir()):
        if path.is_dir():  # some tokenizers have folders, which replace no older one by themselves
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    partial.rmdir()


def as_new_files(folder):
    """Give the files in `folder` the rights that new ones have: safetensors writes weights for their owner alone."""
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write(path, record):
    """Write `record` (a JSON-able dict) to `path` with schema version and checksum, atomically and without secrets.

    Raises RecordError where a number is not finite, and where a path or a repository's name holds a secret.
    """
    if key := _secret_name(record):
        raise RecordError(
            f"{path}: not written, its {key} holds what is taken for a secret: a password, a token or the value of an "
            "environment variable such as HF_TOKEN; give it another name or unset that variable"
        )
    content = {"schema_version": SCHEMA_VERSION} | {k: v for k, v in redacted(record).items() if k != "checksum"}
    try:
        checksum = digest(content)
    except ValueError as error:
        raise RecordError(
            f"{path}: not written, it holds a number that is not finite ({_not_finite(content)})"
        ) from error
    with atomic(path) as file:
        json.dump(content | {"checksum": checksum}, file, indent=1, ensure_ascii=False)
        file.write("\n")


def _secret_name(content, path=""):
    """Dotted key of the first of `NAMES` in `content` that would not be written as it is; None where there is none."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    for key, value in content.items() if isinstance(content, dict) else ():
        here = f"{path}.{key}".lstrip(".")
        if key in NAMES and isinstance(value, str) and redacted(value) != value:
            return here
        if found := _secret_name(value, here):
            return found
    return None


def _not_finite(content, path=""):
    """Dotted path of the first non-finite number in `content`."""
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        finite = not isinstance(content, float) or abs(content) < float("inf")
        return None if finite else path
    return next((found for key, value in items if (found := _not_finite(value, f"{path}.{key}".lstrip(".")))), None)


def read(path, remedy="delete it and run snakemake again"):
    """The record at `path`, its checksum verified. Raises `RecordError` with `remedy` where it cannot be trusted."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingRecord(f"{path}: there is no such record (snakemake {path} makes it)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error}); {remedy}") from error
    try:
        record = parsed(text)
        checksum = record.pop("checksum")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: is not a whole record; {remedy}") from error
    if record.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(f"{path}: schema version {record.get('schema_version')}, not {SCHEMA_VERSION}; {remedy}")
    if not _matches(record, checksum):
        raise RecordError(f"{path}: was changed after it was written (its checksum differs); {remedy}")
    return record


def _matches(record, checksum):
    try:
        return digest(record) == checksum
    except ValueError:  # a number that is not finite, which no record is written with
        return False


class Clock:
    """Wall time and peak memory of a job, from its creation to `provenance`."""

    def __init__(self):
        self.started = time.time()

    def provenance(self, settings=None, seed=None, **fingerprints):
        """What a number rests on: resolved settings, seed, fingerprints, versions, device, seconds, peak bytes."""
        return {
            "settings": settings,
            "seed": seed,
            "fingerprints": fingerprints,
            "versions": versions(),
            **running(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 3),
        }


def running():
    """{device, threads, peak_memory_bytes} of this process so far."""
    return {"device": device_name(), "threads": _threads(), "peak_memory_bytes": peak_memory()}


def versions():
    """Versions of Python, Coppice and the packages that numbers depend on; those not installed are left out."""
    import importlib.metadata

    from coppice import __version__

    found = {"python": platform.python_version(), "coppice": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory():
    """Peak resident bytes of this process and, where a GPU was used, peak allocated bytes on it."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["gpu"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return peak


def device_name():
    """The device that torch computes on in this process; the host's processor where torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"cpu ({platform.machine()})"


def _threads():
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else 1
