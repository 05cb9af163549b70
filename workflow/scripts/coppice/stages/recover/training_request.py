"""What a training is asked for: the front door of this stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coppice import models


@dataclass(frozen=True)
class TrainingRequest:
    """One training of a checkpoint."""

    identity: dict[str, str]
    """{model, candidate or config}, written to every record."""
    source: models.Source
    """The checkpoint."""
    datasets: dict[str, str | Path]
    """Name -> path of dataset.json, for every data set that `settings` name."""
    settings: dict[str, Any]
    """The section `finetune` of the configuration."""
    prompt: str
    """The prompt format: alpaca, chat or none."""
    output: Path
    """The folder to write."""
    seed: int = 0
    """Seed of the data order, the initialization and dropout."""
    world: int = 1
    """The number of processes."""
    stop_share: float | None = None
    """Stop after this fraction of the training and write the validation loss there to `reached.json`; a later request
    continues from there."""
    example_losses: bool = False
    """Whether to write the loss of every validation example to `validation_losses.json`."""
    expected: int | None = None
    """The number of parameters that must be trainable, or None if it is unknown."""
