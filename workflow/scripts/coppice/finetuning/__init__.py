"""Fine-tuning of a checkpoint, by LoRA or of all weights: examples, recipe and the training itself."""

from .all_weights import MODEL, DoesNotFit, check_room
from .budget import OPERATIONS
from .prediction import trainable_parameters
from .progress import Diverged
from .training import EACH, REACHED, finetune, told

__all__ = [
    "EACH",
    "MODEL",
    "OPERATIONS",
    "REACHED",
    "Diverged",
    "DoesNotFit",
    "check_room",
    "finetune",
    "told",
    "trainable_parameters",
]
