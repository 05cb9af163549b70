"""One process at a time works on a job.

Where Snakemake is killed alone, its jobs go on, and the next run starts them a second time: two trainings in one folder
would take each other's checkpoints. The second waits, and then finds done what the first one did.
"""

import contextlib
import logging
import os
import socket
import sys
from pathlib import Path

from . import disks

logger = logging.getLogger("coppice.jobs")


@contextlib.contextmanager
def alone(log):
    """Run the block while no other process runs one for the job whose log is `log`; None: for no job.

    The lock lies beside the log and is the kernel's: it is free once its process is gone, however that ended. On a file
    system without locks the block runs all the same, with a warning.
    """
    if log is None:
        yield
        return
    path = Path(log).with_name(f".{Path(log).name}.lock")
    with disks.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed below; unbuffered: else closing it writes once more
    with file:
        if _locked(file):
            with disks.naming(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _locked(file):
    """Wait for the lock on `file` and take it; False where there are no locks."""
    import fcntl

    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode() or "another process"
            # to the terminal: the log and the status file are the other one's still
            print(
                f"{holder} is still at work on this job, for a run that was killed or has another folder: waiting for "
                f"it to end ({file.name})",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning("%s: cannot be locked (%s): see to it that no other run works on this job", file.name, error)
        return False
    return True
