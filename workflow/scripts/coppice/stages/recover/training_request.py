"""What a training is asked for: the front door of this stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from coppice import models
from coppice.core.aliases import Record
from coppice.study.settings.resolved import Budget
from coppice.study.settings.sections.finetune import Finetune
from coppice.study.settings.sections.section import setting


class TrainingSettings(Finetune):
    """The section `finetune` of one training, with what an ablation adds to it."""

    train: str = setting("lora", "What is trained: a key of `recoveries.TRAINED`.")
    budget: Budget | None = setting(None, "The length of the training, in place of epochs and max_steps.")

    @classmethod
    def of(cls, finetune: Finetune) -> Self:
        """Return the settings of a training by the section `finetune`, which is checked already."""
        return cls.model_construct(**dict(finetune))

    def recorded(self, prompt: str) -> Record:
        """Return the settings as records have them: those that were given, and the prompt format."""
        return self.model_dump(exclude_unset=True) | {"prompt": prompt}


@dataclass(frozen=True)
class TrainingRequest:
    """One training of a checkpoint."""

    identity: dict[str, str]
    """{model, candidate or config}, written to every record."""
    source: models.Source
    """The checkpoint."""
    datasets: dict[str, str | Path]
    """Name -> path of dataset.json, for every data set that `settings` name."""
    settings: TrainingSettings
    """How to train."""
    prompt: str
    """The prompt format: alpaca, chat or none."""
    output: Path
    """The folder to write."""
    seed: int = 0
    """Seed of the data order, the initialization and dropout."""
    teacher: models.Source | None = None
    """The model to learn from, if `settings.objective` asks for one."""
    world: int = 1
    """The number of processes."""
    stop_share: float | None = None
    """Stop after this fraction of the training and write the validation loss there to `reached.json`; a later request
    continues from there."""
    example_losses: bool = False
    """Whether to write the loss of every validation example to `validation_losses.json`."""
    expected: int | None = None
    """The number of parameters that must be trainable, or None if it is unknown."""
