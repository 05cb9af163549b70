"""What jobs ask for: memory, GPU memory, disk and minutes by the model's size, GPUs, and who goes first.

Takes the study and its models' configurations; gives the functions and numbers that the rules have under `resources:`
and `priority:`. The sums are those of `coppice.planning.job_resources`.
"""

sizes = job_resources.Sizes(study)

# Which of the jobs that are ready starts first: the longest, trainings, then what they wait for; evaluations of dense and
# pruned models (0) fill the gaps
PRIORITY = {
    "choice": 90,
    "build": 80,
    "finetune": 60,
    "score": 50,
    "prune": 40,
    "finetuned": 30,
}


def on_a_cluster():
    """Whether other machines run the jobs. Of a dry run's executor no more is known than that it wants threads."""
    intended = workflow.dryrun and workflow.execution_settings.use_threads
    return bool(intended or not workflow.local_exec)


@functools.cache
def computes_on_gpu():
    """Whether jobs that ask for a GPU will have one: asked when the first job is sized."""
    return gpus.present() or on_a_cluster()


@functools.cache
def largest_gpu():
    """MB of the largest GPU here, where jobs share them."""
    shared = study.config["gpus"]["share"] and not on_a_cluster()
    return gpus.largest() if shared else None


def asked(job, key):
    """What a job asks for of `mem_mb`, `gpu_mem_mb`, `disk_mb` or `runtime`: see `job_resources`. Known for certain once the
    model's configuration is here, which Snakemake asks for again before the job starts.
    """

    def resource(wildcards, input, attempt):
        return sizes.asked(
            job,
            wildcards.model,
            attempt,
            on_gpu=computes_on_gpu(),
            candidate=wildcards.get("candidate"),
            taken_over=takes_over(input),
            largest=largest_gpu(),
        )[key]

    return resource


def weights_on_disk(wildcards):
    """MB that fetching a model writes."""
    if study.models[wildcards.model]["source"]["kind"] != "hub":
        return job_resources.SPARE_DISK // job_resources.MB
    return sizes.fetched(wildcards.model) // job_resources.MB


def takes_over(input):
    """Whether a job only takes over the results of another config. Before all configs have chosen, Snakemake has the
    choice that is waited for in the place of those results: then nothing is said yet.
    """
    reused = input.get("reuse", [])
    paths = [reused] if isinstance(reused, str) else reused
    return any(Path(path).name != Path(SELECTION).name for path in paths)


def gpu_count(stage):
    """GPUs of a job of `stage`: none where it takes over the results of another config."""

    def gpu(wildcards, input):
        return 0 if takes_over(input) else study.resources_per_job[stage]["gpu"]

    return gpu


def gpu_model(stage):
    """The kind of GPU that a job of `stage` asks a cluster for; nothing where it takes none."""
    count = gpu_count(stage)

    def model(wildcards, input):
        wanted = study.resources_per_job[stage]["gpu_model"]
        return wanted if count(wildcards, input) else None

    return model
