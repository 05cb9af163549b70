"""Disks that are full or refuse to be written to: what is said about it, and what killed jobs leave on them.

Files and folders that are not whole yet are called `.partial-<host>-<process>-...`: so that those of a process that is
gone can be told from those that are being written.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import time
from pathlib import Path

from .errors import causes, system_number

PARTIAL = ".partial"
ABANDONED = 24 * 3600  # seconds after which what another machine left is taken for nobody's
_NAMED = re.compile(rf"{re.escape(PARTIAL)}-(?P<host>.+)-(?P<pid>\d+)-[^-]*$")
_REFUSED = {
    errno.ENOSPC: "no space is left on its disk",
    errno.EDQUOT: "the quota of its disk is used up",
    errno.EFBIG: "it would be larger than files may be here",
    errno.EROFS: "its disk can only be read",
    errno.EACCES: "it may not be written or read",
    errno.EIO: "its disk fails",
}
_TORCHS = re.compile(r"inline_container.*unexpected pos|PytorchStreamWriter failed")  # of a file that it cannot end


def partial_name():
    """The beginning of a name for what this process is writing."""
    return f"{PARTIAL}-{socket.gethostname()}-{os.getpid()}-"


def in_words(error, places=()):
    """A sentence for the user about `error` where a disk is the reason, else None. `places`: where it wrote, probably.

    Also of libraries that raise errors of their own, with the system's in their text or none at all.
    """
    for cause in causes(error):
        if number := _number(cause):
            file = getattr(cause, "filename", None) or next(iter(places), "a file")
            return (
                f"{file}: {_REFUSED[number]} ({cause}); make room for it or give the right to, and run the same "
                "command again: what is finished stays"
            )
    return None


@contextlib.contextmanager
def naming(path):
    """Have an OSError of the block say which file it is about: one of writing, to a disk that is full, does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _number(error):
    """The system's number of an error that is told here, or None."""
    number = system_number(error)
    if number is None and _TORCHS.search(str(error)):
        return errno.ENOSPC
    return number if number in _REFUSED else None


def gone(host, pid):
    """Whether the process `pid` of the machine `host` has ended; only its own machine can tell."""
    if host != socket.gethostname() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def sweep(folders):
    """Remove what processes that are gone were writing under `folders`; returns the paths that went."""
    found = []
    for folder in folders:
        for place, names, files in os.walk(folder):
            partial = [name for name in [*names, *files] if name.startswith(PARTIAL)]
            names[:] = [name for name in names if not name.startswith(PARTIAL)]
            found += [path for name in partial if _is_abandoned(path := Path(place) / name)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # somebody else's, in a folder that is shared
                path.unlink(missing_ok=True)
    return [path for path in found if not path.exists()]


def _is_abandoned(path):
    named = _NAMED.match(path.name)
    if named and named["host"] == socket.gethostname():
        return gone(named["host"], int(named["pid"]))
    try:
        newest = max(each.lstat().st_mtime for each in [path, *(path.rglob("*") if path.is_dir() else [])])
    except OSError:  # it is whole by now, or not for us to look at
        return False
    return time.time() - newest > ABANDONED
