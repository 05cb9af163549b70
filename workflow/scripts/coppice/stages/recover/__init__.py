"""Recover: fine-tune a pruned checkpoint, with a LoRA adapter or by training all weights.

`base` says what a recovery is, and `recoveries` which there are. `training` is the whole stage and `engine` the
training itself. They import torch, which planning a study does not need, so `finetune` imports them when it is called.
"""

from coppice import models
from coppice.core.aliases import Record

from .base import Diverged, DoesNotFit, Recovery
from .distillation import Teacher
from .full import MODEL
from .job import EXAMPLE_LOSSES_FILE, RUNG_LOSS_FILE
from .recoveries import recovery_of
from .training_request import TrainingRequest, TrainingSettings

__all__ = [
    "EXAMPLE_LOSSES_FILE",
    "MODEL",
    "RUNG_LOSS_FILE",
    "Diverged",
    "DoesNotFit",
    "Recovery",
    "Teacher",
    "TrainingRequest",
    "TrainingSettings",
    "check_layers",
    "finetune",
    "recovery_of",
    "trainable_parameters",
]


def finetune(request: TrainingRequest) -> None:
    """Fine-tune a checkpoint; see `training.finetune`."""
    from . import training

    training.finetune(request)


def trainable_parameters(source: models.Source, settings: TrainingSettings) -> int:
    """Return how many parameters of the checkpoint `source` would be trained, from a model without weights."""
    return recovery_of(settings).trained.predict(models.skeleton(source), models.kind_of(source), settings)


def check_layers(model: str, source: models.Source, settings: Record) -> None:
    """Raise SettingsError if the checkpoint `source` of a model lacks a layer that is to be trained.

    settings: the section `finetune`. The check needs no weights, so it is made before anything computes.
    """
    from coppice.models import intake

    with intake.told_of(model):
        trainable_parameters(source, TrainingSettings.model_validate(settings))
