"""Recover: fine-tune a pruned checkpoint, with a LoRA adapter or by training all weights.

`base` says what a recovery is, and `registry` which there are. `training` is the whole stage and `engine` the training
itself; they import torch, which planning a study does not need, so `finetune` imports them when it is called.
"""

from .base import Diverged, DoesNotFit, Recovery
from .full import MODEL
from .job import EXAMPLE_LOSSES_FILE, RUNG_LOSS_FILE
from .registry import recovery_of

__all__ = [
    "EXAMPLE_LOSSES_FILE",
    "MODEL",
    "RUNG_LOSS_FILE",
    "Diverged",
    "DoesNotFit",
    "Recovery",
    "finetune",
    "recovery_of",
    "trainable_parameters",
]


def finetune(*arguments, **options):
    """Fine-tune a checkpoint; see `training.finetune`."""
    from . import training

    training.finetune(*arguments, **options)


def trainable_parameters(source, settings):
    """Return how many parameters of the checkpoint `source` (a models.Source) would be trained.

    The count comes from a model without weights. settings: the section `finetune`.
    """
    from coppice import models

    return recovery_of(settings).trained.predict(models.skeleton(source), models.kind_of(source), settings)
