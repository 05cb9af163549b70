"""Run one tiny model through what Coppice does with a model, and say how each part went."""

import re
from collections.abc import Callable
from pathlib import Path

from coppice import data, models
from coppice.core import records
from coppice.core.errors import CoppiceError
from coppice.models import kinds
from coppice.models.prefix_tree import TreeForward
from coppice.stages import evaluate, prune, recover
from coppice.stages.prune import candidates
from coppice.study.settings.sections.evaluate import Evaluate

from . import tiny

YES, NO = "yes", "no"
PARTS = ("evaluate", "LoRA", "full", "depth", "width", "unstructured", "engine")
POINTS = {
    "depth": {"method": "depth", "ratio": 0.25},
    "width": {"method": "width", "ratio": 0.5, "importance": "taylor", "parts": ["mlp", "attention"]},
    "unstructured": {"method": "unstructured", "ratio": 0.5},
}
SETTINGS = {
    "data": {"dataset": "rows", "val_size": 2, "validation": None, "cutoff_len": 16, "train_on_inputs": False},
    "lora": {"preset": None, "r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "bias": "none"}
    | {"use_rslora": False, "use_dora": False, "init": "default"},
    "epochs": 1,
    "max_steps": 1,
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "batch_size": 4,
}


def rows(folder: Path) -> Path:
    """Write a small data set of texts that is also one of completions, and return its dataset.json."""
    words = [f"w{3 + (7 * i) % 90}" for i in range(400)]
    text = [{"text": " ".join(words[start : start + 20])} for start in range(0, 400, 20)]
    data.write("rows", {"train": text, "selection": text, "report": text}, folder)
    return folder / "dataset.json"


def run(title: str, folder: Path) -> dict[str, str]:
    """Return part -> "yes", or "no: " and the reason, for one architecture; the folder must be empty."""
    source = models.Source(str(tiny.save(title, folder / "model")))
    if models.known_context_length(models.load(source)) is None:
        source = models.Source(source.path, context_length=tiny.LENGTH)
    record = rows(folder / "rows")
    trials: dict[str, Callable[[], str]] = {
        "evaluate": lambda: _evaluated(source, record, folder / "evaluated"),
        "LoRA": lambda: _trained(source, record, folder / "adapter", {}),
        "full": lambda: _trained(source, record, folder / "full", {"train": "all"}),
        **{name: lambda name=name: _pruned(source, record, folder / name, POINTS[name]) for name in POINTS},
        "engine": lambda: _engine(source),
    }
    found = {}
    for part in PARTS:
        try:
            found[part] = trials[part]()
        except CoppiceError as error:
            found[part] = f"{NO}: {str(error).replace(str(folder), 'FOLDER')}"
    return found


def _evaluated(source: models.Source, record: Path, output: Path) -> str:
    """Evaluate the perplexity with the stage's own function; its record holds a finite number, or this raises."""
    settings = Evaluate.model_validate({"perplexity": {"datasets": ["rows"]}, "zero_shot": {"tasks": []}})
    settings = settings.model_copy(update={"cost": settings.cost.model_copy(update={"enabled": False})})
    who = {"model": "M", "config": "c", "stage": "dense"}
    evaluate.evaluate(evaluate.EvaluationRequest(who, source, settings, {"rows": str(record)}, output))
    assert records.read(output / "evaluation_results.json")["perplexity"]["rows"]["value"] > 1
    return YES


def _trained(source: models.Source, record: Path, output: Path, changes: dict[str, str]) -> str:
    """Train one step, and load and evaluate the result."""
    settings = recover.TrainingSettings.model_validate(SETTINGS | changes)
    who = {"model": "M", "config": "c"}
    recover.finetune(recover.TrainingRequest(who, source, {"rows": record}, settings, "none", output))
    facts = records.read(output / "finetuning_config.json")
    assert facts["trainable_parameters"] == recover.trainable_parameters(source, settings)
    if changes:
        models.load(models.Source(str(output / recover.MODEL)))
    else:
        models.load(source, output)
    return YES


def _pruned(source: models.Source, record: Path, output: Path, point: dict) -> str:
    """Prune, and load what was saved."""
    prune.check_grid("M", Path(source.path) / "config.json", {"c": point})
    calibration = {"record": str(record), "dataset": "rows", "samples": 4, "length": 16}
    candidates.prune({"model": "M", "candidate": "c"}, candidates.PruningRequest(source, point, calibration, output))
    models.load(models.Source(str(output)))
    return YES


def _engine(source: models.Source) -> str:
    """Return what scores choices and trains: the prefix tree, or what takes its place."""
    model = models.load(source)
    scorer = kinds.of(model.config).scorer(model, None)
    return "prefix tree" if scorer is not None else "lm-eval"


def short(answer: str) -> str:
    """Return an answer without its reason."""
    return re.sub(r":.*", "", answer, flags=re.DOTALL)


__all__ = ["PARTS", "TreeForward", "run", "short"]
