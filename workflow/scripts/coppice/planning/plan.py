"""Estimate jobs, hours, memory and disk of each stage of a study before it runs, for `coppice plan`.

The estimates are those by which the jobs request memory and time (`job_resources`). A model without a config.json and
without `models.X.parameters` has an unknown size; the plan leaves it out and names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from coppice.stages import recover, select

from . import job_resources

if TYPE_CHECKING:
    from rich.table import Table

    from coppice.study.settings import Study

GB = 10**9
JOBS = ("prune", "score", "latency", "finetune")  # the jobs of all other stages are evaluations


@dataclass
class Stage:
    """The jobs of one kind over all models.

    Attributes:
        name: its name in the plan.
        jobs: their number.
        hours: their hours on a device together.
        longest: minutes of the longest job.
        mem_mb: largest request of memory in MB.
        gpu_mem_mb: largest request of a GPU's memory in MB.
        disk_mb: largest request of disk in MB.
        runtime: largest request of time in minutes.
    """

    name: str
    jobs: int = 0
    hours: float = 0.0
    longest: float = 0.0
    mem_mb: int = 0
    gpu_mem_mb: int = 0
    disk_mb: int = 0
    runtime: int = 0


@dataclass
class Plan:
    """The plan of a study.

    Attributes:
        stages: its stages.
        ablations: its ablations, which `snakemake` alone does not run.
        disk: kind of file -> bytes.
        unknown: the models whose size is not known.
    """

    stages: list[Stage]
    ablations: list[Stage]
    disk: dict[str, int]
    unknown: list[str]


def plan(study: Study, tflops: float, on_gpu: bool = True) -> Plan:
    """Return the Plan of a study.

    Args:
        study: a settings.Study.
        tflops: 10^12 operations per second that a GPU achieves.
        on_gpu: whether the jobs have GPUs; if not, `tflops` is ignored.
    """
    sizes = job_resources.Sizes(study)
    stages = {name: Stage(name) for name in ("prune", "score", "dense", "pruned", "latency", "finetune", "finetuned")}
    disk = dict.fromkeys(("dense models", "candidates, all", "candidates, chosen", "adapters and checkpoints"), 0)
    for model in study.active_models():
        has_size = sizes.shape(model) is not None
        for name, count in _jobs(study, model).items():
            stages[name].jobs += count
            if has_size and count:
                _add(stages[name], count, study, sizes, model, tflops, on_gpu)
        if has_size:
            _add_disk(disk, study, sizes, model)
    ablations = [_ablation(name, study, sizes, tflops, on_gpu) for name in study.ablations]
    return Plan(list(stages.values()), ablations, disk, sizes.unknown())


def _ablation(name: str, study: Study, sizes: job_resources.Sizes, tflops: float, on_gpu: bool) -> Stage:
    """Return the Stage of an ablation's arms, each trained and measured once per seed."""
    stage, one = Stage(f"ablation {name}"), study.ablations[name]
    for arm in one.arms:
        stage.jobs += len(one.seeds)
        if one.start.kind == "model" and one.start.model in sizes.unknown():
            continue
        need = sizes.arm(name, arm, on_gpu)
        seconds = sizes.seconds("finetune", need, on_gpu, tflops * 10**12)
        gpus = max(1, sizes.machine("finetune", on_gpu).gpus)
        _count(stage, len(one.seeds), seconds, gpus, sizes.granted("finetune", need, on_gpu=on_gpu))
    return stage


def _jobs(study: Study, model: str) -> dict[str, int]:
    candidates, configs, seeds = len(study.candidates(model)), _configs(study, model), len(study.training_seeds(model))
    own = study.config.candidates.table is not None
    made = 1 if study.shares_candidate_jobs() else candidates
    criteria = study.criteria_of(model)
    scored = sum(select.needs_scoring(one, criteria) for one in study.candidates(model).values())
    return {
        "prune": 0 if own else made,
        "score": min(made, scored),
        "dense": 1,
        "pruned": configs,
        "latency": int(study.evaluate_of(model).cost.enabled),
        "finetune": configs * seeds,
        "finetuned": configs * seeds,
    }


def _configs(study: Study, model: str) -> int:
    """Return the number of configs of a model in this run."""
    return sum(one == model for one, _ in study.pairs())


def _add(
    stage: Stage, count: int, study: Study, sizes: job_resources.Sizes, model: str, tflops: float, on_gpu: bool
) -> None:
    """Add `count` jobs of a model to a stage."""
    job = stage.name if stage.name in JOBS else "evaluate"
    kind = job_resources.STAGE.get(job, job)
    candidates = [None] if study.shares_candidate_jobs() else list(study.candidates(model))
    for candidate in candidates if job in ("prune", "score") else [None]:
        seconds = sizes.seconds(kind, sizes.need(job, model, on_gpu, candidate), on_gpu, tflops * 10**12)
        share = count / len(candidates) if job in ("prune", "score") else count
        gpus = max(1, sizes.machine(kind, on_gpu).gpus)
        _count(stage, share, seconds, gpus, sizes.requested(job, model, on_gpu=on_gpu, candidate=candidate))


def _count(stage: Stage, jobs: float, seconds: float, gpus: int, asked: Mapping[str, int]) -> None:
    """Add `jobs` jobs to a stage, each taking `seconds` on `gpus` GPUs. asked: the resources that one requests."""
    stage.hours += jobs * seconds / 3600 * gpus
    stage.longest = max(stage.longest, seconds / 60)
    for key, value in asked.items():
        setattr(stage, key, max(value, getattr(stage, key)))


def _add_disk(disk: dict[str, int], study: Study, sizes: job_resources.Sizes, model: str) -> None:
    shape, configs, finetune = sizes.shape(model), _configs(study, model), study.finetune_of(model)
    whole = sizes.fetched(model) - job_resources.SPARE_DISK
    disk["dense models"] += whole
    if study.config.candidates.table is None:
        kept = [job_resources.kept(point) * whole for point in study.candidates(model).values()]
        chosen = sorted(kept)[-configs:] if study.config.candidates.keep == "selected" else kept
        disk["candidates, all"] += int(sum(kept))
        disk["candidates, chosen"] += int(sum(chosen))
    trainings = configs * len(study.training_seeds(model))
    settings = recover.TrainingSettings.of(finetune)
    trained = recover.recovery_of(settings).trained.memory(shape, settings).parameters
    merged = whole if finetune.merge else 0
    disk["adapters and checkpoints"] += trainings * (job_resources.TRAINED_BYTES * trained + merged)


def table(found: Plan, tflops: float, on_gpu: bool = True) -> tuple[Table, list[str]]:
    """Return the plan as a rich table and a list of text lines to print below it."""
    from rich import box
    from rich.table import Table

    device = "GPU" if on_gpu else "machine"
    shown = Table(box=box.SIMPLE_HEAD)
    titles = (
        "stage",
        "jobs",
        f"{device}\nhours",
        "longest\n(min)",
        "time limit\n(min)",
        "memory\n(GB)",
        "GPU memory\n(GB)",
        "disk\n(GB)",
    )
    for title in titles:
        width = max(map(len, title.split("\n")))
        shown.add_column(title, justify="left" if title == "stage" else "right", min_width=width)
    for stage in found.stages:
        shown.add_row(*_cells(stage), end_section=stage is found.stages[-1])
    for stage in found.ablations:
        shown.add_row(*_cells(stage))
    total = sum(stage.hours for stage in found.stages)
    speed = f"at {tflops:g} TFLOP/s per GPU (--tflops)" if on_gpu else "without a GPU"
    lines = [
        f"{sum(stage.jobs for stage in found.stages)} jobs with a model, {total:.1f} {device} hours {speed}, assuming "
        "the official evaluation splits and alpaca-cleaned",
        "time limit, memory and disk: the largest request of any one job; each retry requests more",
        "total disk: " + ", ".join(f"{what} {size / GB:.0f} GB" for what, size in found.disk.items()),
    ]
    if found.ablations:
        hours = sum(stage.hours for stage in found.ablations)
        lines.append(f"the ablations are extra: `snakemake ablation` takes {hours:.1f} {device} hours")
    if found.unknown:
        lines.append(
            f"models of unknown size, not included: {', '.join(found.unknown)}; run `snakemake fetch`, or set "
            "models.X.parameters"
        )
    return shown, lines


def _cells(stage: Stage) -> tuple[str, ...]:
    if not stage.runtime:  # the stage has no job, or no job of a model whose size is known
        return (stage.name, str(stage.jobs), *["?" if stage.jobs else "-"] * (len(fields(Stage)) - 2))
    sizes = (stage.mem_mb, stage.gpu_mem_mb, stage.disk_mb)
    gigabytes = [f"{size / 1000:.1f}" if size else "-" for size in sizes]
    return (stage.name, str(stage.jobs), f"{stage.hours:.1f}", f"{stage.longest:.0f}", str(stage.runtime), *gigabytes)
