"""What a study will take before anything is spent: jobs, GPU hours, memory and disk a stage, as `coppice plan` shows.

Sizes follow from the models' configurations, fetched or local; before that from `models.X.parameters`; else they are
unknown, and said to be.
"""

from dataclasses import dataclass

from . import estimates, selection

GB = 10**9
STAGES = ("prune", "score", "dense", "pruned", "finetune", "finetuned")
GPU_STAGE = {"prune": "prune", "finetune": "finetune"}  # the others ask for what `evaluate` does
START = 60  # seconds until a job of a large model computes: imports, and the weights off the disk
# The official evaluation splits of the seven tasks, choices sharing their context, and both texts
EVALUATED_TOKENS = 2_400_000
TRAINED_ROWS, ROW_TOKENS = 51_760, 150  # of alpaca-cleaned


@dataclass
class Stage:
    """Jobs of one kind over all models: their number, time, and the largest peak of a GPU's memory."""

    name: str
    jobs: int = 0
    gpu_seconds: float = 0.0
    longest: float = 0.0
    gpu_bytes: int = 0


@dataclass
class Plan:
    """The stages of a study, bytes on disk by what they hold, and the models whose size is not known."""

    stages: list
    disk: dict
    unknown: list


def config_file(study, model):
    """Where the configuration of a model lies once it is known."""
    source = study.models[model]["source"]
    if source["kind"] == "local":
        return f"{source['path']}/config.json"
    if source["kind"] == "miniature":
        return f"{study.resources}/miniature/models/{source['path']}/checkpoint/config.json"
    return f"{study.resources}/models/{model}/config.json"


def plan(study, tflops):
    """The Plan of a `settings.Study`, at `tflops` * 10^12 operations a second and GPU."""
    stages = {name: Stage(name) for name in STAGES}
    disk = dict.fromkeys(("dense models", "candidates, all", "candidates, chosen", "adapters and checkpoints"), 0)
    unknown = []
    configs, seeds = len(study.active_configs()), len(study.training_seeds())
    for model in study.active_models():
        counts = _jobs(study, model, configs, seeds)
        for name, count in counts.items():
            stages[name].jobs += count
        shape = estimates.shape_of(config_file(study, model))
        parameters = shape.parameters if shape else study.models[model]["parameters"]
        if parameters is None:
            unknown.append(model)
            continue
        _add_times(stages, study, counts, len(study.candidates(model)), parameters, tflops)
        if shape:
            _add_memory(stages, study, model, shape)
        _add_disk(disk, study, model, parameters, shape, configs * seeds)
    return Plan(list(stages.values()), disk, unknown)


def _jobs(study, model, configs, seeds):
    candidates = len(study.candidates(model))
    own = study.config["candidates"]["table"] is not None
    made = 1 if study.config["candidates"]["per_job"] == "all" else candidates
    scored = sum(selection.needs_scoring(one, study.configs) for one in study.candidates(model).values())
    return {
        "prune": 0 if own else made,
        "score": min(made, scored),
        "dense": 1,
        "pruned": configs,
        "finetune": configs * seeds,
        "finetuned": configs * seeds,
    }


def _add_times(stages, study, counts, candidates, parameters, tflops):
    """Operations: 2 a parameter and token forwards, 4 for a LoRA step, 6 for a gradient of every weight."""
    finetune, calibration = study.finetune, study.calibration
    rows = finetune["max_steps"] and finetune["max_steps"] * finetune["batch_size"]
    trained = 4 * (rows or finetune["epochs"] * TRAINED_ROWS) * min(ROW_TOKENS, finetune["data"]["cutoff_len"])
    operations = dict.fromkeys(STAGES, 2 * EVALUATED_TOKENS)
    operations |= {"finetune": trained, "prune": 6 * calibration["samples"] * calibration["length"]}
    for name in ("prune", "score"):  # a job may make and score several
        operations[name] *= candidates / (counts[name] or 1)
    for name, count in counts.items():
        gpus = study.resources_per_job[GPU_STAGE.get(name, "evaluate")]["gpu"] or 1
        seconds = START + operations[name] * parameters / (tflops * 10**12 * gpus)
        stages[name].gpu_seconds += count * seconds * gpus
        stages[name].longest = max(stages[name].longest, seconds if count else 0)


def _add_memory(stages, study, model, shape):
    peaks = estimates.peaks(shape, study.models[model], study.finetune, study.calibration)
    for name, stage in stages.items():
        stage.gpu_bytes = max(stage.gpu_bytes, int(peaks[GPU_STAGE.get(name, "evaluate")]) if stage.jobs else 0)


def _add_disk(disk, study, model, parameters, shape, trainings):
    width = estimates.BYTES[study.models[model]["dtype"]]
    whole = parameters * width
    disk["dense models"] += whole
    if study.config["candidates"]["table"] is None:
        kept = [_kept(point) * whole for point in study.candidates(model).values()]
        disk["candidates, all"] += int(sum(kept))
        chosen = sorted(kept)[-len(study.active_configs()) :]
        disk["candidates, chosen"] += int(sum(chosen if study.config["candidates"]["keep"] == "selected" else kept))
    if shape:  # the adapter, and two checkpoints of it with the optimizer's state
        disk["adapters and checkpoints"] += trainings * 28 * estimates.adapter_parameters(shape, study.finetune["lora"])


def _kept(point):
    """The share of a dense checkpoint that a candidate takes, at most; zeros of unstructured pruning stay."""
    return 1.0 if point["method"] == "unstructured" else 1 - 0.7 * point["ratio"]


def table(found, tflops):
    """The plan as a rich table and lines under it."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("stage", "jobs", "longest job", "GPU hours", "GPU memory, at most"):
        shown.add_column(column, justify="left" if column == "stage" else "right")
    for stage in found.stages:
        memory = f"{stage.gpu_bytes / GB:.0f} GB" if stage.gpu_bytes else "?"
        shown.add_row(
            stage.name, str(stage.jobs), f"{stage.longest / 60:.0f} min", f"{stage.gpu_seconds / 3600:.1f}", memory
        )
    total = sum(stage.gpu_seconds for stage in found.stages) / 3600
    lines = [
        f"{sum(stage.jobs for stage in found.stages)} jobs with a model, {total:.1f} GPU hours at {tflops:g} TFLOP/s a "
        "GPU (--tflops), the official evaluation splits and alpaca-cleaned assumed",
        "disk: " + ", ".join(f"{what} {size / GB:.0f} GB" for what, size in found.disk.items()),
    ]
    if found.unknown:
        lines.append(
            f"size not known before it is fetched, and left out: {', '.join(found.unknown)} (run snakemake fetch, or "
            "set models.X.parameters)"
        )
    return shown, lines
