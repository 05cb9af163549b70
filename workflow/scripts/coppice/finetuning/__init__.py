"""LoRA fine-tuning of a pruned checkpoint: examples, recipe and the training itself."""

from .training import finetune

__all__ = ["finetune"]
