"""Run one tiny model through what Coppice does with a model, and say how each part went."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coppice import data, models
from coppice.core import records
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import kinds
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
    "lora": {"preset": None, "r": 2, "alpha": 4, "dropout": 0.05, "target_modules": "all-linear", "bias": "none"}
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
    """Return part -> "yes", what it takes or what takes its place, or "no: " and the reason.

    Args:
        title: the architecture's.
        folder: an empty folder.
    """
    source = models.Source(str(tiny.save(title, folder / "model")))
    unlimited = models.known_context_length(models.load(source)) is None
    if unlimited:
        source = models.Source(source.path, context_length=tiny.LENGTH)
    record = rows(folder / "rows")
    trials: dict[str, Callable[[], str]] = {
        "evaluate": lambda: _evaluated(source, record, folder / "evaluated", unlimited),
        "LoRA": lambda: _adapted(source, record, folder),
        "full": lambda: _trained(source, record, folder / "full", {"train": "all"}),
        **{name: lambda name=name: _pruned(source, record, folder / name, POINTS[name]) for name in POINTS},
        "engine": lambda: _engine(source),
    }
    return {part: _answer(trials[part], folder) for part in PARTS}


def _answer(trial: Callable[[], str], folder: Path) -> str:
    """Return the answer of a trial. An error that Coppice does not word is a fault and is raised."""
    try:
        return trial()
    except CoppiceError as error:
        return f"{NO}: {str(error).replace(str(folder), 'FOLDER')}"


def _evaluated(source: models.Source, record: Path, output: Path, unlimited: bool) -> str:
    """Measure the perplexity with the stage's own function."""
    settings = Evaluate.model_validate(
        {"perplexity": {"datasets": ["rows"]}, "zero_shot": {"tasks": []}, "generation": {"new_tokens": 2}}
        | {"cost": {"batch_sizes": [1], "prompt_tokens": 8, "new_tokens": 1}}
    )
    who = {"model": "M", "config": "c", "stage": "dense"}
    evaluate.evaluate(evaluate.EvaluationRequest(who, source, settings, {"rows": str(record)}, output))
    assert records.read(output / "evaluation_results.json")["perplexity"]["rows"]["value"] > 1
    return "with `context_length`" if unlimited else YES


def _adapted(source: models.Source, record: Path, folder: Path) -> str:
    """Train an adapter with the default settings, or with those that the message asks for."""
    try:
        return _trained(source, record, folder / "adapter", {})
    except SettingsError as error:
        if "finetune.lora.dropout" not in str(error):
            raise
    _trained(source, record, folder / "without-dropout", {"lora": SETTINGS["lora"] | {"dropout": 0.0}})
    return "with `dropout: 0`"


def _trained(source: models.Source, record: Path, output: Path, changes: dict[str, Any]) -> str:
    """Train one step, check the number of trained parameters, and load the result."""
    settings = recover.TrainingSettings.model_validate(SETTINGS | changes)
    who = {"model": "M", "config": "c"}
    expected = recover.trainable_parameters(source, settings)
    request = recover.TrainingRequest(who, source, {"rows": record}, settings, "none", output, expected=expected)
    recover.finetune(request)
    whole = recover.recovery_of(settings).trained
    if whole.adapter:
        models.load(source, output)
    else:
        models.load(models.Source(str(whole.folder(output))))
    return YES


def _pruned(source: models.Source, record: Path, output: Path, point: dict[str, Any]) -> str:
    """Prune, and load what was saved."""
    prune.check_grid("M", Path(source.path) / "config.json", {"c": point})
    calibration = {"record": str(record), "dataset": "rows", "samples": 4, "length": 16, "windows": "running"}
    candidates.prune({"model": "M", "candidate": "c"}, candidates.PruningRequest(source, point, calibration, output))
    models.load(models.Source(str(output)))
    return YES


def _engine(source: models.Source) -> str:
    """Return what scores choices: the prefix tree, or the harness in its place."""
    model = models.load(source)
    return "lm-eval" if isinstance(kinds.of(model.config).scorer(model, None), kinds.Fallback) else "prefix tree"
