"""The frame of the jobs that compute with a model: log and status, threads, and the GPUs that they may use."""

import os
from contextlib import contextmanager

from . import gpus, logs


def run_from(folder):
    """Have every script import the package that lies in `folder`: Snakemake puts the scripts' own folder last, after
    whatever checkout is installed in the environment."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


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
    with (
        logs.job(log, threads, status, title, unused) as tell,
        gpus.lease(resources.get("gpu", 0), resources.get("gpu_mem_mb"), tell),
    ):
        yield
