"""Fingerprints: SHA-256 of weights, files and settings, so that a result is never taken for another's.

Hashing the weights of an 8B model reads 16 GB, so a file's digest is kept in the user's cache folder under its path,
size, inode and time stamps, and read again only when one of them changed.
"""

import hashlib
import json
import os
from pathlib import Path

from .errors import CheckpointError
from .parsing import parsed
from .records import atomic, digest, write

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


def file_digest(path):
    """Hex SHA-256 of a file's bytes, from the cache where the file is unchanged."""
    path = Path(path).resolve()
    stat = path.stat()
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entry = _cache() / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    try:
        cached = parsed(entry.read_text())
        if cached["state"] == state:
            return cached["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: the file is hashed again
    sha256 = content_digest(path)
    try:
        with atomic(entry) as file:
            json.dump({"path": str(path), "state": state, "sha256": sha256}, file)
    except OSError:
        return sha256  # a read-only home costs time, not correctness
    return sha256


def _cache():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coppice" / "fingerprints"


def weights_files(folder):
    """The weight files of a checkpoint or adapter folder, sorted; safetensors where there are any, else `.bin`."""
    for pattern in WEIGHTS:
        if files := sorted(path for path in Path(folder).glob(pattern) if path.is_file()):
            return files
    raise CheckpointError(f"{folder}: holds no weights ({' or '.join(WEIGHTS)})")


def weights(folder):
    """Fingerprint of a checkpoint folder: digests of its weight files, and of its configuration and shapes.

    Two folders with the same tensors in other shards differ; the same files under another path agree.
    """
    files = weights_files(folder)
    extra = [
        p
        for name in ("config.json", "adapter_config.json", "pruned_shapes.json")
        if (p := Path(folder) / name).is_file()
    ]
    try:
        return digest([[p.name, file_digest(p)] for p in [*files, *extra]])
    except OSError as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({error})") from error


def tokenizer(folder):
    """Fingerprint of the tokenizer in a checkpoint folder: of every file that can decide what it does."""
    found = sorted({path for pattern in TOKENIZER for path in Path(folder).glob(pattern) if path.is_file()})
    return digest([[path.name, file_digest(path)] for path in found])


def gather(paths, output):
    """Write the record {files: path -> digest} of `paths`; it changes with the files, and with them alone."""
    write(output, {"files": {str(path): content_digest(path) for path in paths}})


def files(paths):
    """Fingerprint of a list of data files, by content and order, whatever their names."""
    return digest([file_digest(p) for p in paths])
