"""The frame of the jobs that compute with a model: log and status, threads, and the GPUs that they may use."""

import os
import re
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager

from . import gpus, logs
from .errors import SettingsError

STARTED = "COPPICE_JOB_STARTED"  # set in a job that a cluster's scheduler started


def run_from(folder):
    """Have every script import the package that lies in `folder`: Snakemake puts the scripts' own folder last, after
    whatever checkout is installed in the environment."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def begin_run():
    """Let all jobs of this call of snakemake know that they belong together: see `logs.job`."""
    os.environ[logs.RUN] = uuid.uuid4().hex


def note_start():
    """Remember when a scheduler started the job that this process is the first of; its other processes inherit it."""
    os.environ.setdefault(STARTED, str(time.time()))


def stop_in_time(resources, ahead=120):
    """Have this process told to stop before a scheduler's time limit ends its job (`runtime`, in minutes): `ahead`
    seconds before, or a quarter of the limit where that is less.

    A scheduler's own warning need not reach it: under cgroups Slurm signals a step's first process alone, which is
    Snakemake, and that waits for its jobs. Without `note_start` there is no limit.
    """
    started, runtime = float(os.environ.get(STARTED, 0)), resources.get("runtime")
    if started and runtime:
        # what begins long after the job did comes after others of its group, each of which adds its time to the limit
        waited = time.time() - started
        elapsed = waited if waited < ahead else 0
        seconds = 60 * runtime - min(ahead, 60 * runtime / 4) - elapsed
        timer = threading.Timer(max(1, seconds), os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()


def gpus_of(resources):
    """GPUs that a job was given: its `gpu`, or where those go by `gres` alone the number in that ("gpu:a100:4")."""
    named = re.match(r"gpu(?::[^:,]+)*?(?::(\d+))?(?:,|$)", str(resources.get("gres") or ""))
    return resources.get("gpu", 0) or (int(named[1] or 1) if named else 0)


@contextmanager
def computing(log, status, title, threads, resources, loading):
    """Run such a job; see `logs.job` and `gpus.lease`.

    threads: what Snakemake granted; resources: of the rule, by name (`gpu`, `gpu_mem_mb`, `cpus_per_task`); loading:
    how the model is loaded.
    """
    # where a cluster's scheduler started the job, `threads` was cut to the cores of the machine that submitted it
    threads = resources.get("cpus_per_task", threads) if os.environ.get(gpus.GIVEN) else threads
    # on a CPU jobs are short, and nothing but a quantised model has a use for it there
    unused = () if loading["quantize"] or gpus.present() else ("bitsandbytes",)
    with logs.job(log, threads, status, title, unused) as note_state:
        if sys.flags.optimize > 1:  # else every checkpoint would seem to be at fault
            raise SettingsError("Python runs without docstrings, which transformers needs: unset PYTHONOPTIMIZE")
        with gpus.lease(resources.get("gpu", 0), resources.get("gpu_mem_mb"), note_state):
            yield
