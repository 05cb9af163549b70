"""Compute what each job requests: memory, GPU memory, disk and minutes, as configured or else from the model's size.

The size comes from the model's config.json, fetched or local; before it is there, from `models.X.parameters`, or from
the definition of a miniature. Once the model is fetched, its record has the exact number of parameters. A job requests
its estimate (`models.estimates`) plus a margin. Each retry requests more: half of the first request again of memory and
disk, and the whole of it again of time.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coppice.core import records
from coppice.core.aliases import Record
from coppice.miniature import tiny_models
from coppice.models import estimates
from coppice.stages import recover
from coppice.stages.evaluate import latency
from coppice.study import layout
from coppice.study.settings import arms
from coppice.study.settings.sections.evaluate import Evaluate
from coppice.study.settings.sections.finetune import Finetune

if TYPE_CHECKING:
    from coppice.study.settings import Study
    from coppice.study.settings.resolved import Budget, StudyModel

MB = 10**6
UNKNOWN = 10**9  # parameters assumed for a model whose size is not known yet
ROOM = 1.25  # factor on the estimated peak; `benchmarks/memory.py` measures the error of the estimates
SPARE_DISK = 1000 * MB  # logs, tokenizers, samples
TRAINED_BYTES = 28  # on disk for each trained parameter: the adapter, and two checkpoints of it with optimizer state
START = 60  # seconds before a job with a large model computes: imports, and reading the weights from disk
SLOWEST = {"gpu": 50 * 10**12, "thread": 15 * 10**9}  # operations per second assumed for a job's time limit
LATE, EXTRA = 2, 20  # a time limit is LATE times the estimate plus EXTRA minutes
# Tokens of the seven tasks' official evaluation splits (choices of an item share its context) and of two texts under
# one protocol
TASKS, TASK_TOKENS, TEXTS, TEXT_TOKENS, ITEM_TOKENS = 7, 1_950_000, 2, 450_000, 200
ANSWERED_ROWS, GENERATED = 5_000, 4  # rows of a data set to answer, and the cost of a generated token in read ones
PICTURES, PICTURE_TOKENS = 5_000, 300  # of a data set of images, and tokens of an image with its text
SHOTS = 4  # solved examples that double the length of an item
WITHOUT_SHARING = 3  # factor on the tokens for the engine lm-eval, which repeats the context for each choice
TRAINED_ROWS, ROW_TOKENS = 51_760, 150  # rows of alpaca-cleaned, and tokens per row
READ = 10**9  # bytes of weights that a job loads per second if it loads models again and again
STAGE = {"score": "evaluate", "latency": "evaluate"}  # job -> the stage whose resources it requests, if it is another
SHORT = 512  # a `cutoff_len` above this means long rows; half of it is then assumed as their length


@dataclass(frozen=True)
class Need:
    """What a job uses: peak bytes of the machine's memory and of each GPU's, bytes written to disk, operations.

    read: bytes of weights that it loads beyond the first load.
    """

    host: int
    gpu: int
    disk: int
    operations: float
    read: int = 0


class Sizes:
    """Compute the needs of a study's jobs. A model's config.json is looked for again until it exists."""

    def __init__(self, study: Study) -> None:
        """Compute for a study. Sizes and needs that were found are kept."""
        self.study = study
        self._shapes: dict[str, estimates.Shape] = {}
        self._needs: dict[tuple[str, str, bool, str | None, estimates.Shape], Need] = {}

    def shape(self, model: str) -> estimates.Shape | None:
        """Return the model's Shape from its config.json, else from a miniature's definition or `models.X.parameters`.

        Return None if the size is unknown.
        """
        if model not in self._shapes:
            file = layout.config_file(self.study, model)
            files = file, os.path.join(os.path.dirname(file), "snapshot", "config.json")
            found = next(filter(None, (estimates.shape_of(path) for path in files if os.path.isfile(path))), None)
            if found is None:
                return self._expected(self.study.models[model])
            self._shapes[model] = found
        if self._shapes[model].counted is None:
            self._shapes[model] = replace(self._shapes[model], counted=self._counted(model))
        return self._shapes[model]

    def _counted(self, model: str) -> int | None:
        """Return the number of parameters in the record of a model that has been fetched, else None."""
        record = layout.Files(self.study).model(model)
        if not os.path.isfile(record):
            return None
        try:
            return records.read(record).get("parameters")
        except records.RecordError:
            return None  # the jobs that need the model report it

    @staticmethod
    def _expected(model: StudyModel) -> estimates.Shape | None:
        """Return the expected Shape of a model that is not here yet; None if its size is unknown."""
        if model.source.kind == "miniature":
            return estimates.shape_in(tiny_models.expected(model.source.path))
        return estimates.shape_like(model.parameters) if model.parameters else None

    def unknown(self) -> list[str]:
        """Return the active models whose size is not known yet."""
        return [model for model in self.study.active_models() if self.shape(model) is None]

    def machine(self, stage: str, on_gpu: bool) -> estimates.Machine:
        """Return the Machine of a job of `stage`: its GPUs, or its CPU threads if there is no GPU."""
        wanted = getattr(self.study.resources_per_job, stage).gpu if on_gpu else 0
        return estimates.Machine(wanted, getattr(self.study.threads_per_job, stage))

    def need(self, stage: str, model: str, on_gpu: bool, candidate: str | None = None) -> Need:
        """Return the Need of a job. Without a `candidate`, a prune or score job works on all the model's candidates."""
        shape = self.shape(model) or estimates.shape_like(UNKNOWN)
        key = stage, model, on_gpu, candidate, shape
        if key not in self._needs:
            self._needs[key] = self._need(stage, model, shape, on_gpu, candidate)
        return self._needs[key]

    def _need(self, stage: str, model: str, shape: estimates.Shape, on_gpu: bool, candidate: str | None) -> Need:
        study, loaded = self.study, self.study.models[model].model_dump()
        calibration, finetune = study.calibration_of(model), study.finetune_of(model)
        every = study.candidates(model)
        points = [every[candidate]] if candidate else list(every.values())
        whole = shape.parameters * estimates.width_of(loaded["dtype"], self.machine("prune", on_gpu))
        read = 0
        if stage == "prune":
            peak = estimates.prune(shape, loaded, points, calibration.model_dump(), self.machine("prune", on_gpu))
            disk = sum(kept(point) for point in points) * whole
            tokens = calibration.samples * calibration.length
            operations = tokens * estimates.pruning_operations(shape, points)
        elif stage == "finetune":
            settings = recover.TrainingSettings.of(finetune)
            recovery, memory = self._recovery(shape, settings, study.teacher_of(model))
            peak = estimates.finetune(shape, loaded, settings, self.machine("finetune", on_gpu), memory)
            disk = TRAINED_BYTES * memory.parameters
            disk += whole if settings.merge else 0
            operations = recovery.operations(shape.parameters) * trained_tokens(settings)
        elif stage == "latency":
            peak = estimates.evaluate(shape, loaded, self.machine("evaluate", on_gpu))
            cost, turns = study.evaluate_of(model).cost, latency.ROUNDS * (1 + len(study.criteria_of(model)))
            tokens = turns * sum(cost.batch_sizes) * (cost.prompt_tokens + cost.new_tokens)
            disk, operations, read = 0, 2 * tokens * shape.parameters, (turns - 1) * whole
        else:
            peak = estimates.evaluate(shape, loaded, self.machine("evaluate", on_gpu))
            tokens = evaluated_tokens(study.evaluate_of(model)) * (len(points) if stage == "score" else 1)
            disk, operations = 0, 2 * tokens * shape.parameters
        return Need(peak.host, peak.gpu, int(disk) + SPARE_DISK, operations, int(read))

    def _recovery(
        self, shape: estimates.Shape, settings: recover.TrainingSettings, teacher: str | None
    ) -> tuple[recover.Recovery, estimates.TrainingMemory]:
        """Return how a model is trained and what that takes. teacher: name of the model that it learns from, if any."""
        if teacher is None:
            recovery = recover.recovery_of(settings)
            return recovery, recovery.trained.memory(shape, settings)
        large = self.shape(teacher) or estimates.shape_like(UNKNOWN)
        recovery = recover.recovery_of(settings, recover.Teacher(large.parameters))
        return recovery, replace(recovery.trained.memory(shape, settings), teacher=large)

    def fetched(self, model: str) -> int:
        """Return the bytes of a hub model on disk: two a parameter, the precision in which most are published."""
        shape = self.shape(model) or estimates.shape_like(UNKNOWN)
        return 2 * shape.parameters + SPARE_DISK

    def seconds(self, stage: str, need: Need, on_gpu: bool, rate: float | None = None) -> float:
        """Return the seconds that a job takes. rate: operations per second and GPU; default: the slowest assumed."""
        machine, start = self.machine(stage, on_gpu), START + need.read / READ
        if not machine.gpus:
            return start + need.operations / (SLOWEST["thread"] * machine.threads)
        # Evaluation and pruning compute on one of their GPUs at a time; only training uses all of them at once
        return start + need.operations / ((rate or SLOWEST["gpu"]) * (machine.gpus if stage == "finetune" else 1))

    def arm(self, ablation: str, name: str, on_gpu: bool) -> Need:
        """Return the Need of an ablation's arm. An arm of a later stage is estimated as if it belonged to the first."""
        one = self.study.ablations[ablation]
        start = one.start
        if start.kind == "checkpoint":
            shape = estimates.shape_of(os.path.join(start.path, "config.json"))
            loaded = {"dtype": start.dtype, "quantize": None, "device_map": None}
        else:
            shape, loaded = self.shape(start.model), self.study.models[start.model].model_dump()
        shape = shape or estimates.shape_like(UNKNOWN)
        settings = arms.resolved(arms.merged(one.base, one.arms[name].changes))
        section = arms.section(one.finetune, settings)
        typed = recover.TrainingSettings.model_validate(section)
        recovery, memory = self._recovery(shape, typed, self.study.teacher_of_arms(ablation))
        trained = estimates.finetune(shape, loaded, typed, self.machine("finetune", on_gpu), memory)
        measured = estimates.evaluate(shape, loaded, self.machine("finetune", on_gpu))
        operations = _budgeted(one.budget, typed, recovery.operations(shape.parameters))
        operations += 2 * shape.parameters * evaluated_tokens(one.evaluate)
        host, gpu = (max(pair) for pair in zip(trained, measured, strict=True))
        return Need(host, gpu, TRAINED_BYTES * memory.parameters + SPARE_DISK, operations)

    def requested(
        self,
        job: str,
        model: str,
        attempt: int = 1,
        on_gpu: bool = True,
        candidate: str | None = None,
        largest: int | None = None,
    ) -> dict[str, int]:
        """Return {mem_mb, gpu_mem_mb, disk_mb, runtime} that a job requests; runtime is in minutes.

        Args:
            job: prune, score, evaluate, latency or finetune.
            model: name of the model.
            attempt: counted from 1; later attempts request more.
            on_gpu: whether the job has GPUs.
            candidate: as in `need`.
            largest: MB of the largest GPU if it is known; no estimate exceeds it.
        """
        need = self.need(job, model, on_gpu, candidate)
        return self.granted(STAGE.get(job, job), need, attempt, on_gpu, largest)

    def granted(
        self, stage: str, need: Need, attempt: int = 1, on_gpu: bool = True, largest: int | None = None
    ) -> dict[str, int]:
        """Return the same for a Need, as a job of `stage` requests it."""
        wanted = {
            "mem_mb": ROOM * need.host / MB,
            "gpu_mem_mb": ROOM * need.gpu / MB,
            "disk_mb": need.disk / MB,
            "runtime": EXTRA + LATE * self.seconds(stage, need, on_gpu) / 60,
        }
        configured = getattr(self.study.resources_per_job, stage)
        given = {key: value for key in wanted if (value := getattr(configured, key)) is not None}
        wanted |= given
        more = {key: attempt if key == "runtime" else 1 + 0.5 * (attempt - 1) for key in wanted}
        asked = {key: math.ceil(value * more[key]) for key, value in wanted.items()}
        if largest:
            asked["gpu_mem_mb"] = max(given.get("gpu_mem_mb", 0), min(asked["gpu_mem_mb"], largest))
        return asked


def _budgeted(budget: Budget, settings: Finetune, per_token: float) -> float:
    """Return the operations of a training from its budget."""
    if budget.unit == "flops":
        return budget.amount
    tokens = budget.amount
    if budget.unit == "max_steps":
        tokens *= settings.batch_size * row_tokens(settings)
    return per_token * tokens


def kept(point: Record) -> float:
    """Return the largest size of a candidate as a share of the dense checkpoint.

    Unstructured pruning stores its zeros, so such a candidate is as large as the dense checkpoint.
    """
    if "method" not in point:  # a row of the user's table: Coppice writes no weights for it
        return 0.0
    keeps_blocks = point["method"] == "width" and any(point.get("keep_blocks", {}).values())
    return 1.0 if point["method"] == "unstructured" or keeps_blocks else 1 - 0.7 * point["ratio"]


def row_tokens(settings: Finetune) -> int:
    """Estimate tokens per training row from `cutoff_len`, because the data are not read yet. settings: `finetune`."""
    longest = settings.data.cutoff_len
    return longest // 2 if longest > SHORT else min(ROW_TOKENS, longest)


def trained_tokens(settings: Finetune) -> float:
    """Estimate the tokens that a training processes. settings: the section `finetune`."""
    rows = settings.max_steps and settings.max_steps * settings.batch_size
    return (rows or settings.epochs * TRAINED_ROWS) * row_tokens(settings)


def evaluated_tokens(settings: Evaluate) -> float:
    """Estimate the tokens of an evaluation. settings: the section `evaluate`.

    The estimate is never below that of the seven tasks and two texts, unless a `limit` is set.
    """
    asked, measured = settings.zero_shot, settings.perplexity
    protocols = 1 if isinstance(measured.protocol, str) else len(measured.protocol)
    texts = TEXT_TOKENS * max(1, protocols) * max(1, len(measured.datasets) / TEXTS)
    items = TASK_TOKENS * max(1, len(asked.tasks) / TASKS)
    if asked.limit is not None:
        items = min(items, asked.limit * ITEM_TOKENS * len(asked.tasks))
    items *= 1 + (asked.num_fewshot or 0) / SHOTS
    return texts + items * (WITHOUT_SHARING if settings.engine == "lm-eval" else 1) + _other_tokens(settings)


def _other_tokens(settings: Evaluate) -> float:
    """Estimate the tokens of answers and of images. settings: the section `evaluate`."""
    answers = settings.answers
    row = ITEM_TOKENS + GENERATED * answers.beams * answers.new_tokens
    tokens = len(answers.datasets) * (answers.limit or ANSWERED_ROWS) * row
    for pictured in (settings.retrieval, settings.classification):
        tokens += len(pictured.datasets) * (pictured.limit or PICTURES) * PICTURE_TOKENS
    return tokens
