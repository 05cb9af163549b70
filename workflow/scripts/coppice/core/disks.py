"""Explain errors of disks that are full or cannot be written, and remove what killed jobs left behind.

Unfinished files and folders are named `.partial-<host>-<process>-...`, which distinguishes the leftovers of an ended
process from what another one is still writing.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .aliases import PathLike
from .errors import causes, system_number

PARTIAL = ".partial"
ABANDONED = 24 * 3600  # seconds after which leftovers of another machine's process are removed
_NAMED = re.compile(rf"{re.escape(PARTIAL)}-(?P<host>.+)-(?P<pid>\d+)-[^-]*$")
_REFUSED = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "the quota of its disk is used up",
    errno.EFBIG: "it would be larger than a file may be here",
    errno.EROFS: "its disk is read-only",
    errno.EACCES: "access to it is denied",
    errno.EIO: "its disk reports an input/output error",
}
# torch raises these, without the system's number, when it cannot finish a file
_TORCHS = re.compile(r"inline_container.*unexpected pos|PytorchStreamWriter failed")


def partial_name() -> str:
    """Return the beginning of a name for what this process is writing."""
    return f"{PARTIAL}-{socket.gethostname()}-{os.getpid()}-"


def explained(error: BaseException, places: Iterable[str] = ()) -> str | None:
    """Return a sentence for the user if a disk is the cause of `error`, otherwise None.

    This includes errors of libraries that hold the system's error only in their text, or not at all. places: where the
    job probably wrote, for an error that names no file.
    """
    for cause in causes(error):
        if number := _number(cause):
            file = getattr(cause, "filename", None) or next(iter(places), "a file")
            return (
                f"{file}: {_REFUSED[number]} ({cause}). Make room or grant access, and run the same command again; it "
                "keeps what is finished."
            )
    return None


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Add the name of the file to an OSError of the block: a write to a full disk raises one without it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _number(error: BaseException) -> int | None:
    """Return the system's number of an error that `_REFUSED` explains; None for any other error."""
    number = system_number(error)
    if number is None and _TORCHS.search(str(error)):
        return errno.ENOSPC
    return number if number in _REFUSED else None


def gone(host: object, pid: object) -> bool:
    """Return whether process `pid` of machine `host` has ended; False for another machine, which cannot be asked."""
    if host != socket.gethostname() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def sweep(folders: Iterable[PathLike]) -> list[Path]:
    """Remove under `folders` what ended processes left unfinished, and return the paths that were removed."""
    found = []
    for folder in folders:
        for place, names, files in os.walk(folder):
            partial = [name for name in [*names, *files] if name.startswith(PARTIAL)]
            names[:] = [name for name in names if not name.startswith(PARTIAL)]  # keeps `os.walk` out of these folders
            found += [path for name in partial if _is_abandoned(path := Path(place) / name)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # another user's file in a shared folder
                path.unlink(missing_ok=True)
    return [path for path in found if not path.exists()]


def _is_abandoned(path: Path) -> bool:
    named = _NAMED.match(path.name)
    if named and named["host"] == socket.gethostname():
        return gone(named["host"], int(named["pid"]))
    try:
        newest = max(each.lstat().st_mtime for each in [path, *(path.rglob("*") if path.is_dir() else [])])
    except OSError:  # its process has renamed or removed it meanwhile, or this one may not read it
        return False
    return time.time() - newest > ABANDONED
