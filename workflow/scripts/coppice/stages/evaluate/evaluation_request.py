"""What an evaluation is asked for: the front door of this stage."""

from dataclasses import dataclass
from pathlib import Path

from coppice import models
from coppice.study.settings.sections.evaluate import Evaluate


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation of a checkpoint, with or without an adapter."""

    identity: dict[str, str | None]
    """{model, config or candidate, stage}, written to every record."""
    source: models.Source
    """The checkpoint."""
    settings: Evaluate
    """The section `evaluate` of the configuration."""
    datasets: dict[str, str]
    """Name -> path of dataset.json, for every text and task that `settings` name."""
    output: Path
    """The folder to write."""
    adapter: Path | None = None
    """The folder of an adapter."""
    purpose: str = "report"
    """report or selection; decides which rows are used."""
    seed: int = 0
    """Seed of the examples in prompts."""
    dense: str | None = None
    """The dense model's model.json. With `candidate`, the evaluation checks that the model is that candidate and not
    the dense model."""
    candidate: str | None = None
    """The candidate's pruning.json."""
    prompt: str = "none"
    """The prompt format of generated answers: alpaca, chat or none."""
