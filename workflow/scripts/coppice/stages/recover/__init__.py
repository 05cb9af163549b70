"""Recover: fine-tune a pruned checkpoint, with a LoRA adapter or by training all weights."""

from .engine.duration import OPERATIONS
from .engine.progress import Diverged
from .full import MODEL, DoesNotFit, check_room
from .parameter_count import trainable_parameters
from .training import EXAMPLE_LOSSES_FILE, RUNG_LOSS_FILE, finetune, trainable_share

__all__ = [
    "EXAMPLE_LOSSES_FILE",
    "MODEL",
    "OPERATIONS",
    "RUNG_LOSS_FILE",
    "Diverged",
    "DoesNotFit",
    "check_room",
    "finetune",
    "trainable_parameters",
    "trainable_share",
]
