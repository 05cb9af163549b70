"""Set up jobs that compute with a model: log and status file, threads, and the GPUs that they may use."""

import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from . import gpus, logs
from .aliases import Json, PathLike
from .errors import SettingsError

STARTED = "COPPICE_JOB_STARTED"  # set in jobs that a cluster's scheduler started


class Resources(Protocol):
    """A rule's resources by name: Snakemake's own object, or a dict."""

    def get(self, name: str, default: Json = None, /) -> Json:
        """Return the resource `name`, or `default` if the rule has none of that name."""


def run_from(folder: str) -> None:
    """Make every script import the package in `folder`.

    Snakemake puts the scripts' own folder last on `sys.path`, behind any checkout installed in the environment.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def begin_run() -> None:
    """Mark all jobs of this Snakemake call as one run, see `logs.job`."""
    os.environ[logs.RUN] = uuid.uuid4().hex


def note_start() -> None:
    """Record when the scheduler started this job; the processes that this one starts inherit the time."""
    os.environ.setdefault(STARTED, str(time.time()))


def stop_in_time(resources: Resources, ahead: float = 120) -> None:
    """Send this process SIGTERM before the scheduler's time limit (`runtime`, in minutes) ends its job.

    The signal comes `ahead` seconds before the limit, or a quarter of the limit before it if that is less. A
    scheduler's own warning may not arrive: with cgroups, Slurm signals only a step's first process, which is Snakemake,
    and Snakemake waits for its jobs. Without `note_start` there is no limit.
    """
    started, runtime = float(os.environ.get(STARTED, 0)), resources.get("runtime")
    if started and runtime:
        # A process that starts long after the scheduler's job is a later job of a group. Each job of a group adds its
        # time to the group's limit, so this one still has all of its own.
        waited = time.time() - started
        elapsed = waited if waited < ahead else 0
        seconds = 60 * runtime - min(ahead, 60 * runtime / 4) - elapsed
        timer = threading.Timer(max(1, seconds), os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()


def gpus_of(resources: Resources) -> int:
    """Return the number of GPUs a job has: its `gpu`, or the number in `gres` ("gpu:a100:4") if only that is set."""
    named = re.match(r"gpu(?::[^:,]+)*?(?::(\d+))?(?:,|$)", str(resources.get("gres") or ""))
    return resources.get("gpu", 0) or (int(named[1] or 1) if named else 0)


@contextmanager
def computing(
    log: PathLike,
    status: PathLike | None,
    title: str,
    threads: int,
    resources: Resources,
) -> Iterator[None]:
    """Run the block as a job that computes with a model, see `logs.job` and `gpus.lease`.

    Args:
        log: the log file, as in `logs.job`.
        status: the status file; None for the one beside the log.
        title: the name of the job in its status file.
        threads: what Snakemake granted.
        resources: the rule's resources by name (`gpu`, `gpu_mem_mb`, `cpus_per_task`).
    """
    # on a cluster, Snakemake cuts `threads` to the cores of the machine that submitted the job
    threads = resources.get("cpus_per_task", threads) if os.environ.get(gpus.GIVEN) else threads
    with logs.job(log, threads, status, title) as note_state:
        if sys.flags.optimize > 1:  # without this check the error would blame the checkpoint
            raise SettingsError("Python runs without docstrings, but transformers needs them. Unset PYTHONOPTIMIZE.")
        with gpus.lease(resources.get("gpu", 0), resources.get("gpu_mem_mb"), note_state):
            yield
