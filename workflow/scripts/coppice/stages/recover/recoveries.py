"""The members of `base`: what can be trained, and on which objective."""

from .base import CrossEntropy, Recovery, Trained
from .full import AllWeights
from .lora import Lora
from .training_request import TrainingSettings

TRAINED: dict[str, Trained] = {"lora": Lora(), "all": AllWeights()}


def recovery_of(settings: TrainingSettings) -> Recovery:
    """Return the recovery that the settings name."""
    return Recovery(TRAINED[settings.train], CrossEntropy())
