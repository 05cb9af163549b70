"""The members of `base`: what can be trained, and on which objective."""

from typing import Any

from .base import CrossEntropy, Recovery
from .full import AllWeights
from .lora import Lora

TRAINED = {"lora": Lora(), "all": AllWeights()}


def recovery_of(settings: Any) -> Recovery:
    """Return the recovery that `settings`, the section `finetune`, name."""
    return Recovery(TRAINED[settings.get("train", "lora")], CrossEntropy())
