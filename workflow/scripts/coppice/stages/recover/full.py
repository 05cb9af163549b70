"""Full fine-tuning: train every weight.

Weights are in float32 while they are trained, whatever their stored dtype, because half precision would round small
updates away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice import models
from coppice.core import fingerprints
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import estimates
from coppice.models.kinds import Example, ModelKind

from . import base
from .activations import checkpoints_activations
from .training_request import TrainingSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "model"  # the folder of the trained checkpoint
BYTES = estimates.ADAPTER_BYTES  # per parameter: its float32 value, its gradient and Adam's two moments


class AllWeights(base.Trained["PreTrainedModel", "torch.Tensor"]):
    """Trains every weight of the model."""

    adapter = False
    operations = base.FORWARD + base.GRADIENT_OF_INPUTS + base.GRADIENT_OF_WEIGHTS

    def prepare(
        self,
        model: PreTrainedModel,
        kind: ModelKind,
        source: models.Source,
        settings: TrainingSettings,
        train: Sequence[Example],
    ) -> PreTrainedModel:
        """Return the model in float32 with all weights trainable.

        Raises:
            SettingsError: The weights are quantized.
            DoesNotFit: Weights, gradients and optimizer exceed the device's memory.
        """
        if source.quantize:
            raise SettingsError(
                "finetune: all weights cannot be trained in a quantized model. Leave out models.X.quantize."
            )
        self.check_room(models.parameters(model))
        if checkpoints_activations(model, settings):
            model.gradient_checkpointing_enable()
        return model.float().requires_grad_(True)

    def predict(self, model: PreTrainedModel, kind: ModelKind, settings: TrainingSettings) -> int:
        """Return the number of all parameters."""
        return models.parameters(model)

    def check_room(self, trainable: int) -> None:
        """Raise DoesNotFit if training takes more memory than the GPU has, or the host without one."""
        needed, room = BYTES * trainable, models.device_memory()
        if needed > room:
            raise base.DoesNotFit(
                f"full fine-tuning of {trainable / 1e9:.2f} billion parameters takes {needed / 2**30:.0f} GiB before "
                f"any activation, but {models.device_kind()} memory is {room / 2**30:.0f} GiB; train with LoRA "
                "(train: lora), choose a smaller model, or use a device with more memory"
            )

    def memory(self, shape: estimates.Shape, settings: TrainingSettings) -> estimates.TrainingMemory:
        """Return the memory of all weights."""
        return estimates.TrainingMemory(shape.parameters, frozen=False)

    def before_training(
        self, model: PreTrainedModel, kind: ModelKind, example: Example, settings: TrainingSettings, output: Path
    ) -> torch.Tensor:
        """Return the outputs for a training example."""
        return base.outputs_of(model, kind, example)

    def check_acts(self, model: PreTrainedModel, kind: ModelKind, example: Example, before: torch.Tensor) -> None:
        """Raise CoppiceError if training changed no output for a training example."""
        if base.outputs_of(model, kind, example).equal(before):
            raise CoppiceError(
                "finetune: training changed no logit of a training example. Check finetune.learning_rate."
            )

    def restore(self, model: PreTrainedModel, checkpoint: Path, device: torch.device) -> None:
        """Load the weights in the folder `checkpoint` into the model."""
        from safetensors.torch import load_file

        state = {}
        for path in fingerprints.weights_files(checkpoint):
            state |= load_file(path, device=str(device))
        model.load_state_dict(state, strict=False)  # tied weights are stored once: one of their two names is missing

    def save(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        output: Path,
        before: torch.Tensor,
        source: models.Source,
    ) -> None:
        """Write the trained checkpoint, in the dtype that it was loaded in."""
        models.save(model.to(models.dtype_of(source.dtype)), tokenizer, self.folder(output))

    def folder(self, output: Path) -> Path:
        """Return the folder of the checkpoint."""
        return output / MODEL
