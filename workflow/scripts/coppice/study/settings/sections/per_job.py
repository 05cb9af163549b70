"""The sections `resources_per_job`, `threads_per_job` and `gpus`: what jobs request."""

from .section import Section, section, setting

MEGABYTES = {"unit": "MB", "ge": 1, "le": 1_000_000_000}


class JobResources(Section):
    """Resources that a job requests."""

    gpu: int = setting(1, "GPUs per job.", ge=0, le=4096)
    gpu_mem_mb: int | None = setting(
        None,
        "Memory in MB that a job uses on each of its GPUs, for `gpus.share`. Null means an estimate from the "
        "model's size. Each retry requests half as much more.",
        **MEGABYTES,
    )
    gpu_model: str | None = setting(
        None,
        "The GPU type to request, with the name that the cluster's scheduler uses. Null accepts any type.",
        pattern="^[A-Za-z0-9][A-Za-z0-9._:-]*$",
    )
    mem_mb: int | None = setting(
        None,
        "Memory in MB. Null means an estimate from the model's size. Each retry requests half as much more.",
        **MEGABYTES,
    )
    disk_mb: int | None = setting(
        None,
        "Disk space in MB that a job writes, for executors that use it. Null means an estimate from the "
        "model's size. Each retry requests half as much more.",
        **MEGABYTES,
    )
    runtime: int | None = setting(
        None,
        "Run time in minutes. Null means an estimate from the model's size. Each retry requests the same time more.",
        unit="minutes",
        ge=1,
        le=10_000_000,
    )


class ResourcesPerJob(Section):
    """The resources that a job of each stage requests, besides its threads."""

    finetune: JobResources = section(JobResources, "Fine-tuning jobs.")
    evaluate: JobResources = section(JobResources, "Evaluation and candidate-scoring jobs.")
    prune: JobResources = section(JobResources, "Pruning jobs.")


class ThreadsPerJob(Section):
    """CPU threads of each job, by stage."""

    finetune: int = setting(8, "Fine-tuning jobs.", ge=1, le=65_536)
    evaluate: int = setting(8, "Evaluation and candidate-scoring jobs.", ge=1, le=65_536)
    prune: int = setting(8, "Pruning jobs.", ge=1, le=65_536)
    build: int = setting(1, "Jobs that build the miniature models and data.", ge=1, le=65_536)


class Gpus(Section):
    """How jobs get the GPUs of this machine. On a cluster, the scheduler assigns them."""

    share: bool = setting(
        False,
        "Whether several jobs may share a GPU, as long as the sum of their `gpu_mem_mb`, given or estimated, "
        "fits. Set the number of jobs at a time with `--resources gpu=N`.",
    )
    skip_busy: bool = setting(False, "Whether to skip GPUs on which another program computes.")
