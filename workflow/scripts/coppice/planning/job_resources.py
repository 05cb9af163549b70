"""What each job asks for: memory, GPU memory, disk and minutes, as configured, else by the model's size.

The size is known from the model's configuration, fetched or local; before that from `models.X.parameters`, of a
miniature from its recipe. What a job asks for is its estimate (`estimates`) with room to spare, and grows with each
attempt: half as much memory and disk again, the time over again.
"""

import math
import os
from dataclasses import dataclass

from coppice.miniature import tiny_models
from coppice.models import estimates
from coppice.study import layout
from coppice.study.settings import arms

MB = 10**6
UNKNOWN = 10**9  # parameters of a model whose size is not known yet
ROOM = 1.25  # times the estimated peak; `benchmarks/memory.py` says how far off estimates are
SPARE_DISK = 1000 * MB  # logs, tokenizers, samples
TRAINED_BYTES = 28  # a trained parameter on disk: the adapter, and two checkpoints of it with the optimizer's state
TAKEN_OVER = 3000 * MB  # memory of a job that only takes over another's results
START = 60  # seconds until a job of a large model computes: imports, and the weights off the disk
SLOWEST = {"gpu": 50 * 10**12, "thread": 15 * 10**9}  # operations a second that a job's time limit counts on
LATE, EXTRA = 2, 20  # a time limit is so many times the estimate, and so many minutes more
# The official evaluation splits of the seven tasks, choices sharing their context, and two texts by one protocol
TASKS, TASK_TOKENS, TEXTS, TEXT_TOKENS, ITEM_TOKENS = 7, 1_950_000, 2, 450_000, 200
SHOTS = 4  # solved examples that make an item as long again
WITHOUT_SHARING = 3  # times the tokens, where each choice comes with its context: the engine lm-eval
TRAINED_ROWS, ROW_TOKENS = 51_760, 150  # of alpaca-cleaned
SHORT = 512  # a longer `cutoff_len` is set for longer rows, of which half of it is assumed


@dataclass(frozen=True)
class Need:
    """What a job takes: peak bytes of the machine's memory and of each GPU's, bytes that it writes, operations."""

    host: int
    gpu: int
    disk: int
    operations: float


class Sizes:
    """The needs of a study's jobs; a model's configuration is looked for until it is there."""

    def __init__(self, study):
        self.study = study
        self._shapes, self._needs = {}, {}

    def shape(self, model):
        """The model's Shape: of its configuration, else of a miniature's recipe or the configured number of parameters.

        None where nothing is known of it.
        """
        if model not in self._shapes:
            file = layout.config_file(self.study, model)
            files = file, os.path.join(os.path.dirname(file), "snapshot", "config.json")
            found = next(filter(None, (estimates.shape_of(path) for path in files if os.path.isfile(path))), None)
            if found is None:
                return self._expected(self.study.models[model])
            self._shapes[model] = found
        return self._shapes[model]

    @staticmethod
    def _expected(model):
        """The Shape of a model that is not here yet, as far as anything is known of it."""
        if model["source"]["kind"] == "miniature":
            return estimates.shape_in(tiny_models.expected(model["source"]["path"]))
        return estimates.shape_like(model["parameters"]) if model["parameters"] else None

    def unknown(self):
        """The models to run whose size is not known yet."""
        return [model for model in self.study.active_models() if self.shape(model) is None]

    def machine(self, stage, on_gpu):
        """Where a job of `stage` computes: on its GPUs, or without any on its threads."""
        wanted = self.study.resources_per_job[stage]["gpu"] if on_gpu else 0
        return estimates.Machine(wanted, self.study.threads_per_job[stage])

    def need(self, stage, model, on_gpu, candidate=None):
        """The Need of a job: of all candidates of a model, where none is named and `stage` is prune or score."""
        shape = self.shape(model) or estimates.shape_like(UNKNOWN)
        key = stage, model, on_gpu, candidate, shape
        if key not in self._needs:
            self._needs[key] = self._need(stage, model, shape, on_gpu, candidate)
        return self._needs[key]

    def _need(self, stage, model, shape, on_gpu, candidate):
        study, loaded = self.study, self.study.models[model]
        every = study.candidates(model)
        points = [every[candidate]] if candidate else list(every.values())
        whole = shape.parameters * estimates.width_of(loaded["dtype"], self.machine("prune", on_gpu))
        if stage == "prune":
            peak = estimates.prune(shape, loaded, points, study.calibration, self.machine("prune", on_gpu))
            disk = sum(kept(point) for point in points) * whole
            # a gradient of every weight: twice the forward pass again
            operations = 6 * study.calibration["samples"] * study.calibration["length"] * len(points)
        elif stage == "finetune":
            peak = estimates.finetune(shape, loaded, study.finetune, self.machine("finetune", on_gpu))
            disk = TRAINED_BYTES * estimates.adapter_parameters(shape, study.finetune["lora"])
            disk += whole if study.finetune["merge"] else 0
            operations = 4 * trained_tokens(study.finetune)  # no gradients of the weights
        else:
            peak = estimates.evaluate(shape, loaded, self.machine("evaluate", on_gpu))
            disk, operations = 0, 2 * evaluated_tokens(study.evaluate) * (len(points) if stage == "score" else 1)
        return Need(peak.host, peak.gpu, int(disk) + SPARE_DISK, operations * shape.parameters)

    def fetched(self, model):
        """Bytes of a hub model on disk: two a parameter, as most are published."""
        shape = self.shape(model) or estimates.shape_like(UNKNOWN)
        return 2 * shape.parameters + SPARE_DISK

    def seconds(self, stage, need, on_gpu, rate=None):
        """How long it takes: at `rate` operations a second and GPU, by default at the slowest that is counted on."""
        machine = self.machine(stage, on_gpu)
        if not machine.gpus:
            return START + need.operations / (SLOWEST["thread"] * machine.threads)
        # an evaluation, and pruning, compute on one of their GPUs at a time
        return START + need.operations / ((rate or SLOWEST["gpu"]) * (machine.gpus if stage == "finetune" else 1))

    def arm(self, ablation, name, on_gpu):
        """The Need of an arm of an ablation; of a stage after the first, as if it began where the first does."""
        one = self.study.ablations[ablation]
        start, changes = one["start"], one["arms"][name]["changes"]
        if start["kind"] == "checkpoint":
            shape = estimates.shape_of(os.path.join(start["path"], "config.json"))
            loaded = {"dtype": start["dtype"], "quantize": None, "device_map": None}
        else:
            shape, loaded = self.shape(start["model"]), self.study.models[start["model"]]
        shape = shape or estimates.shape_like(UNKNOWN)
        settings = arms.settled(arms.laid_over(one["base"], changes))
        section = arms.section(one["finetune"], settings)
        trained = estimates.finetune(shape, loaded, section, self.machine("finetune", on_gpu))
        measured = estimates.evaluate(shape, loaded, self.machine("finetune", on_gpu))
        everything = settings["train"] == arms.ALL_WEIGHTS
        parameters = shape.parameters if everything else estimates.adapter_parameters(shape, section["lora"])
        operations = _budgeted(one["budget"], section, 6 if everything else 4, shape.parameters)
        operations += 2 * shape.parameters * evaluated_tokens(one["evaluate"])
        host, gpu = (max(pair) for pair in zip(trained, measured, strict=True))
        return Need(host, gpu, TRAINED_BYTES * parameters + SPARE_DISK, operations)

    def asked(self, job, model, attempt=1, on_gpu=True, candidate=None, taken_over=False, largest=None):
        """{mem_mb, gpu_mem_mb, disk_mb, runtime} that a job asks for at an attempt, counted from 1.

        job: prune, score, evaluate or finetune; taken_over: whether it only takes over another job's results; largest:
        MB of the largest GPU, where that is known: no estimate asks for more.
        """
        need = self.need(job, model, on_gpu, candidate)
        if taken_over:
            need = Need(min(TAKEN_OVER, need.host), 0, need.disk, 0.0)
        asked = self.granted("evaluate" if job == "score" else job, need, attempt, on_gpu, largest)
        return asked | ({"gpu_mem_mb": 0} if taken_over else {})

    def granted(self, stage, need, attempt=1, on_gpu=True, largest=None):
        """The same for a Need, of a job that computes as those of `stage` do."""
        wanted = {
            "mem_mb": ROOM * need.host / MB,
            "gpu_mem_mb": ROOM * need.gpu / MB,
            "disk_mb": need.disk / MB,
            "runtime": EXTRA + LATE * self.seconds(stage, need, on_gpu) / 60,
        }
        given = self.study.resources_per_job[stage]
        given = {key: given[key] for key in wanted if given.get(key) is not None}
        wanted |= given
        more = {key: attempt if key == "runtime" else 1 + 0.5 * (attempt - 1) for key in wanted}
        asked = {key: math.ceil(value * more[key]) for key, value in wanted.items()}
        if largest:
            asked["gpu_mem_mb"] = max(given.get("gpu_mem_mb", 0), min(asked["gpu_mem_mb"], largest))
        return asked


def _budgeted(budget, section, operations, parameters):
    """Operations of a training by its budget: {unit: max_steps, tokens or flops, amount}."""
    if budget["unit"] == "flops":
        return budget["amount"]
    tokens = budget["amount"]
    if budget["unit"] == "max_steps":
        tokens *= section["batch_size"] * row_tokens(section)
    return operations * parameters * tokens


def kept(point):
    """The share of a dense checkpoint that a candidate takes, at most; zeros of unstructured pruning stay."""
    if "method" not in point:  # a row of the user's table: nothing is written
        return 0.0
    return 1.0 if point["method"] == "unstructured" else 1 - 0.7 * point["ratio"]


def row_tokens(settings):
    """Tokens of a row, by the section `finetune`: nothing is known of the data, `cutoff_len` says what is expected."""
    longest = settings["data"]["cutoff_len"]
    return longest // 2 if longest > SHORT else min(ROW_TOKENS, longest)


def trained_tokens(settings):
    """Tokens that a training sees, by the section `finetune`."""
    rows = settings["max_steps"] and settings["max_steps"] * settings["batch_size"]
    return (rows or settings["epochs"] * TRAINED_ROWS) * row_tokens(settings)


def evaluated_tokens(settings):
    """Tokens of an evaluation, by the section `evaluate`; never less than the seven tasks and both texts would take,
    but for a `limit`."""
    asked, measured = settings["zero_shot"], settings["perplexity"]
    protocols = 1 if isinstance(measured["protocol"], str) else len(measured["protocol"])
    texts = TEXT_TOKENS * max(1, protocols) * max(1, len(measured["datasets"]) / TEXTS)
    items = TASK_TOKENS * max(1, len(asked["tasks"]) / TASKS)
    if asked["limit"] is not None:
        items = min(items, asked["limit"] * ITEM_TOKENS * len(asked["tasks"]))
    items *= 1 + (asked["num_fewshot"] or 0) / SHOTS
    return texts + items * (WITHOUT_SHARING if settings["engine"] == "lm-eval" else 1)
