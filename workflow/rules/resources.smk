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


@functools.cache
def computes_on_gpu():
    """Return whether jobs that request a GPU will get one. It is found out once, when the first job is sized."""
    return gpus.present() or snakemake_compat.uses_a_cluster(workflow)


@functools.cache
def largest_gpu():
    """Return the MB of the largest GPU of this machine if jobs share GPUs, else None."""
    shared = study.config["gpus"]["share"] and not snakemake_compat.uses_a_cluster(
        workflow
    )
    return gpus.largest() if shared else None


def requested(job, key):
    """Return a resource function for `mem_mb`, `gpu_mem_mb`, `disk_mb` or `runtime` (see `job_resources`).

    The value is exact once the model's config.json is here. Snakemake evaluates it again before the job starts.
    """

    def resource(wildcards, input, attempt):
        return sizes.requested(
            job,
            wildcards.model,
            attempt,
            on_gpu=computes_on_gpu(),
            candidate=wildcards.get("candidate"),
            taken_over=reuses_results(input),
            largest=largest_gpu(),
        )[key]

    return resource


def weights_on_disk(wildcards):
    """Return the MB that fetching a model writes to disk."""
    if study.models[wildcards.model]["source"]["kind"] != "hub":
        return job_resources.SPARE_DISK // job_resources.MB
    return sizes.fetched(wildcards.model) // job_resources.MB


def reuses_results(input):
    """Return whether a job only reuses the results of another config.

    Until all configs have chosen, the input is the selection record that the job waits for, and the answer is False.
    """
    reused = input.get("reuse", [])
    paths = [reused] if isinstance(reused, str) else reused
    return any(Path(path).name != Path(SELECTION).name for path in paths)


def gpu_count(stage):
    """Return a resource function for the GPUs of a job of `stage`: none if it reuses the results of another config."""

    def gpu(wildcards, input):
        return 0 if reuses_results(input) else study.resources_per_job[stage]["gpu"]

    return gpu


def gpu_model(stage):
    """Return a resource function for the GPU model that a job of `stage` requests; None if the job uses no GPU."""
    count = gpu_count(stage)

    def model(wildcards, input):
        wanted = study.resources_per_job[stage]["gpu_model"]
        return wanted if count(wildcards, input) else None

    return model
