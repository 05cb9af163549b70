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

from filelock import FileLock, Timeout

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
    # A lock file that only marks the lock by its existence would stay behind a killed job for ever.
    lock = FileLock(path, fallback_to_soft=False)
    with disks.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if _acquired(lock, path):
        with disks.naming(path):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock, path: Path) -> bool:
    """Wait for the lock and take it; return False if the file system has no locks."""
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            holder = path.read_text() or "another process"
            # to the terminal, because the log and the status file still belong to the other process
            print(
                f"Waiting for {holder}, which still holds this job's lock (it belongs to a run that was killed or that "
                f"has another folder): {path}",
                file=sys.stderr,
                flush=True,
            )
            lock.acquire(poll_interval=0.5)
    except OSError as error:
        logger.warning("%s: cannot be locked (%s). Make sure that no other run works on this job.", path, error)
        return False
    return True
