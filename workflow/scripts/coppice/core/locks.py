"""Let one process at a time work on a job.

If only Snakemake is killed, its jobs go on and the next run starts them a second time. Two trainings in one folder
would take each other's checkpoints. With this lock the second process waits, and then finds the work done.
"""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from . import disks
from .aliases import PathLike

logger = logging.getLogger("coppice.jobs")


@contextlib.contextmanager
def alone(log: PathLike | None) -> Iterator[None]:
    """Run the block while no other process works on the job whose log is `log`; with None, take no lock.

    The lock file lies beside the log. The kernel releases the lock when its process ends, however it ends. On a file
    system without locks the block runs after a warning.
    """
    if log is None:
        yield
        return
    path = Path(log).with_name(f".{Path(log).name}.lock")
    with disks.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed below; unbuffered, so that closing writes nothing
    with file:
        if _locked(file):
            with disks.naming(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _locked(file: IO[bytes]) -> bool:
    """Wait for the lock on `file` and take it; return False if the file system has no locks."""
    import fcntl

    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode() or "another process"
            # to the terminal, because the log and the status file still belong to the other process
            print(
                f"Waiting for {holder}, which still holds this job's lock (it belongs to a run that was killed or that "
                f"has another folder): {file.name}",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning("%s: cannot be locked (%s). Make sure that no other run works on this job.", file.name, error)
        return False
    return True
