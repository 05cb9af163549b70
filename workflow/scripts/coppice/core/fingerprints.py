"""Compute fingerprints, SHA-256 of weights, files and settings, so that results of different inputs are never confused.

Hashing the weights of an 8B model reads 16 GB. Therefore the user's cache folder keeps each file's hash with the path,
size, inode and time stamps of the file, which is read again only if one of them changed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from .aliases import PathLike
from .errors import CheckpointError
from .json_text import parsed
from .records import atomic, digest

DigestOf = Callable[[Path], str | None]  # returns the hash of a file, or None if it does not know it

WEIGHTS = ("*.safetensors", "*.bin")
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # what trainers write beside `.bin` weights
TOKENIZER = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",  # of the image processor of a model that sees
)


def content_digest(path: PathLike) -> str:
    """Return the hex SHA-256 of a file's bytes, read now."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_digest(path: PathLike) -> str | None:
    """Return a file's hex SHA-256 from the cache; None if the file was never read or has changed since."""
    path = Path(path).resolve()
    try:
        cached = parsed(_entry(path).read_text())
        return cached["sha256"] if cached["state"] == _state(path) else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None  # the entry is missing or damaged, or there is no home folder: the file must be read


def file_digest(path: PathLike) -> str:
    """Return the hex SHA-256 of a file's bytes, from the cache if the file is unchanged."""
    path = Path(path).resolve()
    cached = cached_digest(path)
    if cached:
        return cached
    # the state comes first: if the file changes while it is read, the cache entry never matches
    state, sha256 = _state(path), content_digest(path)
    try:
        with atomic(_entry(path)) as file:
            json.dump({"path": str(path), "state": state, "sha256": sha256}, file)
    except (OSError, RuntimeError):
        return sha256  # without a cache folder that can be written, only time is lost
    return sha256


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _entry(path: Path) -> Path:
    return _cache() / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coppice" / "fingerprints"


def weights_files(folder: PathLike) -> list[Path]:
    """Return the weight files of a checkpoint or adapter folder, sorted: safetensors if it has any, else `.bin`."""
    for pattern in WEIGHTS:
        found = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
        if files := [path for path in found if path.name not in NO_WEIGHTS]:
            return files
    raise CheckpointError(f"{folder}: holds no weights ({' or '.join(WEIGHTS)})")


def weights(folder: PathLike, digest_of: DigestOf = file_digest) -> str | None:
    """Return the fingerprint of a checkpoint folder: the hash of its weight files, configuration and layer shapes.

    The same tensors in other shards give another fingerprint; the same files under another path give the same one.
    digest_of: how to find the hash of a file; if it returns None for any of them, so does this function.
    """
    files = weights_files(folder)
    extra = [
        p
        for name in ("config.json", "adapter_config.json", "pruned_shapes.json")
        if (p := Path(folder) / name).is_file()
    ]
    try:
        return _of([*files, *extra], digest_of)
    except OSError as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({error})") from error


def tokenizer(folder: PathLike, digest_of: DigestOf = file_digest) -> str | None:
    """Return the fingerprint of a checkpoint folder's tokenizer and image processor, from all their files."""
    found = sorted({path for pattern in TOKENIZER for path in Path(folder).glob(pattern) if path.is_file()})
    return _of(found, digest_of)


def code(folder: PathLike) -> str:
    """Return the fingerprint of a checkpoint folder's Python files: a model that runs them depends on them, too."""
    return _of(sorted(path for path in Path(folder).rglob("*.py") if path.is_file()), file_digest)


def _of(paths: Iterable[Path], digest_of: DigestOf) -> str | None:
    found = [[path.name, digest_of(path)] for path in paths]
    return digest(found) if all(sha256 for _, sha256 in found) else None


def files(paths: Iterable[PathLike]) -> str:
    """Return the fingerprint of a list of data files, from their contents in order; names do not count."""
    return digest([file_digest(p) for p in paths])
