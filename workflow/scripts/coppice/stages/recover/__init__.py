"""Recover: fine-tune a pruned checkpoint, with a LoRA adapter or by training all weights."""

from .engine.duration import OPERATIONS
from .engine.progress import Diverged
from .full import MODEL, DoesNotFit, check_room
from .parameter_count import trainable_parameters
from .training import EACH, REACHED, finetune, trainable_share

__all__ = [
    "EACH",
    "MODEL",
    "OPERATIONS",
    "REACHED",
    "Diverged",
    "DoesNotFit",
    "check_room",
    "finetune",
    "trainable_parameters",
    "trainable_share",
]
