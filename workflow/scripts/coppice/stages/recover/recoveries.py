"""The members of `base`: what can be trained, and on which objective."""

from . import distillation
from .base import CrossEntropy, Recovery, Trained
from .full import AllWeights
from .lora import Lora
from .training_request import TrainingSettings

TRAINED: dict[str, Trained] = {"lora": Lora(), "all": AllWeights()}


def recovery_of(settings: TrainingSettings, teacher: distillation.Teacher | None = None) -> Recovery:
    """Return the recovery that the settings name.

    Args:
        settings: of the training.
        teacher: the one that the objective needs. Without it, only what is trained may be asked of the recovery.
    """
    objective = distillation.Distillation(settings.objective, teacher) if teacher else None
    return Recovery(TRAINED[settings.train], objective or CrossEntropy())
