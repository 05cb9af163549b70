"""Fingerprints: SHA-256 of weights, files and settings, so that a result is never taken for another's.

Hashing the weights of an 8B model reads 16 GB, so a file's digest is kept in the user's cache folder under its path,
size, inode and time stamps, and read again only when one of them changed.
"""

import hashlib
import json
import os
from pathlib import Path

from .errors import CheckpointError
from .json_text import parsed
from .records import atomic, digest

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def content_digest(path):
    """Hex SHA-256 of a file's bytes, read now."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path):
    """Hex SHA-256 of a file's bytes as it was read last, None where the file was never read or has changed since."""
    path = Path(path).resolve()
    try:
        cached = parsed(_entry(path).read_text())
        return cached["sha256"] if cached["state"] == _state(path) else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None  # absent or damaged, or nobody's home: the file has to be read


def file_digest(path):
    """Hex SHA-256 of a file's bytes, from the cache where the file is unchanged."""
    path = Path(path).resolve()
    known = known_digest(path)
    if known:
        return known
    state, sha256 = _state(path), content_digest(path)
    try:
        with atomic(_entry(path)) as file:
            json.dump({"path": str(path), "state": state, "sha256": sha256}, file)
    except (OSError, RuntimeError):
        return sha256  # a read-only home, or none, costs time, not correctness
    return sha256


def _state(path):
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _entry(path):
    return _cache() / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"


def _cache():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coppice" / "fingerprints"


def weights_files(folder):
    """The weight files of a checkpoint or adapter folder, sorted; safetensors where there are any, else `.bin`."""
    for pattern in WEIGHTS:
        if files := sorted(path for path in Path(folder).glob(pattern) if path.is_file()):
            return files
    raise CheckpointError(f"{folder}: holds no weights ({' or '.join(WEIGHTS)})")


def weights(folder, digest_of=file_digest):
    """Fingerprint of a checkpoint folder: digests of its weight files, and of its configuration and shapes.

    Two folders with the same tensors in other shards differ; the same files under another path agree. digest_of: how a
    file's digest is found; None where that finds none for one of them.
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


def tokenizer(folder, digest_of=file_digest):
    """Fingerprint of the tokenizer in a checkpoint folder: of every file that can decide what it does."""
    found = sorted({path for pattern in TOKENIZER for path in Path(folder).glob(pattern) if path.is_file()})
    return _of(found, digest_of)


def code(folder):
    """Fingerprint of the Python in a checkpoint folder: of a model that runs it, it decides as much as the weights."""
    return _of(sorted(path for path in Path(folder).rglob("*.py") if path.is_file()), file_digest)


def _of(paths, digest_of):
    found = [[path.name, digest_of(path)] for path in paths]
    return digest(found) if all(sha256 for _, sha256 in found) else None


def files(paths):
    """Fingerprint of a list of data files, by content and order, whatever their names."""
    return digest([file_digest(p) for p in paths])
