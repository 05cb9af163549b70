"""Resources and priorities of jobs: memory, GPU memory, disk, minutes and GPUs.

Input: the study and its models' config.json files.
Output: the functions and numbers that rules use under `resources:` and `priority:`. The estimates are those of
`coppice.planning.job_resources`.
"""

sizes = job_resources.Sizes(study)

# The order in which ready jobs start. Choices and model building go first because others wait for them, then the
# trainings, which take longest, then the jobs that trainings wait for. Evaluations of dense and pruned models (priority
# 0) fill the gaps.
PRIORITY = {
    "choice": 90,
    "build": 80,
    "finetune": 60,
    "score": 50,
    "prune": 40,
    "finetuned": 30,
}


# Jobs whose size depends on the candidate; the others request what the dense model would need
OF_CANDIDATE = ("prune", "score")


@functools.cache
def computes_on_gpu():
    """Return whether jobs that request a GPU will get one. It is found out once, when the first job is sized."""
    return gpus.present() or snakemake_compat.uses_a_cluster(workflow)


@functools.cache
def largest_gpu():
    """Return the MB of the largest GPU of this machine if jobs share GPUs, else None."""
    shared = study.config.gpus.share and not snakemake_compat.uses_a_cluster(workflow)
    return gpus.largest() if shared else None


def requested(job, key):
    """Return a resource function for `mem_mb`, `gpu_mem_mb`, `disk_mb` or `runtime` (see `job_resources`).

    The value is exact once the model's config.json is here. Snakemake evaluates it again before the job starts.
    """

    def resource(wildcards, attempt):
        return sizes.requested(
            job,
            wildcards.model,
            attempt,
            on_gpu=computes_on_gpu(),
            candidate=wildcards.get("candidate") if job in OF_CANDIDATE else None,
            largest=largest_gpu(),
        )[key]

    return resource


def weights_on_disk(wildcards):
    """Return the MB that fetching a model writes to disk."""
    if study.models[wildcards.model].source.kind != "hub":
        return job_resources.SPARE_DISK // job_resources.MB
    return sizes.fetched(wildcards.model) // job_resources.MB


def gpu_model(stage):
    """Return a resource function for the GPU model that a job of `stage` requests; None if the job uses no GPU."""
    wanted = getattr(study.resources_per_job, stage)
    return lambda wildcards: wanted.gpu_model if wanted.gpu else None
