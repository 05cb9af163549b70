"""What a recovery is: what it trains, on which objective, what it saves, and what it costs.

A recovery combines independent choices. `Trained` says which weights change and how they are saved, `Objective` which
loss they minimize. The engine (batches, checkpoints, several processes, resuming) and the rest of the stage ask a
Recovery and know none of its members by name: a new one is a module and a line in `recoveries`.

The data are a third choice, which `examples` makes. The method is a fourth: today gradients over whole optimizer steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from coppice import models
from coppice.core.errors import CoppiceError
from coppice.models.estimates import Shape, TrainingMemory
from coppice.models.kinds import Engine, Example, MicroBatch, ModelKind

from .training_request import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from coppice.models.kinds import LoadedModel

    Rates = dict[float, list[nn.Parameter]]  # learning rate -> the parameters that have it

Model = TypeVar("Model", bound="LoadedModel")  # the class of a prepared model
Before = TypeVar("Before")  # what `check_acts` and `save` need to know about the untrained model

# Operations per parameter and token: of a forward pass, and the same again for the gradients of layers' inputs, and for
# the gradients of their weights.
FORWARD = GRADIENT_OF_INPUTS = GRADIENT_OF_WEIGHTS = 2


class Diverged(CoppiceError):
    """The loss of a training is NaN or infinite."""


class DoesNotFit(CoppiceError):
    """The weights that are trained, with their gradients and optimizer, take more memory than the device has."""


class Trained(ABC, Generic[Model, Before]):
    """Which weights of a model are trained, and how they are saved.

    Attributes:
        adapter: whether the result is an adapter beside an unchanged checkpoint. If not, it is a checkpoint.
        operations: per parameter of the model and token of training.
    """

    adapter: bool
    operations: int

    @abstractmethod
    def prepare(
        self,
        model: PreTrainedModel,
        kind: ModelKind,
        source: models.Source,
        settings: TrainingSettings,
        train: Sequence[Example],
    ) -> Model:
        """Return the model with exactly those weights trainable.

        Args:
            model: as loaded from `source`, in training mode.
            kind: its kind.
            source: the checkpoint.
            settings: how to train.
            train: the training examples, for initializations that read them.
        """

    @abstractmethod
    def predict(self, model: PreTrainedModel, kind: ModelKind, settings: TrainingSettings) -> int:
        """Return how many parameters would be trained, from a model without weights (`models.skeleton`)."""

    def counts(self, model: Model) -> tuple[int, int]:
        """Return (trainable parameters, all parameters) of a prepared model; a tied one counts once."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad), models.parameters(model)

    def rates(self, model: Model, kind: ModelKind, settings: TrainingSettings) -> Rates:
        """Return learning rate -> trained parameters, for those that have another one than `finetune.learning_rate`."""
        return {}

    @abstractmethod
    def check_room(self, trainable: int) -> None:
        """Raise DoesNotFit if training so many parameters takes more memory than the device has."""

    @abstractmethod
    def memory(self, shape: Shape, settings: TrainingSettings) -> TrainingMemory:
        """Return what decides the memory of a training, from the sizes of the model alone."""

    def after_step(self, model: LoadedModel) -> None:
        """Correct the trained weights after an optimizer step; by default nothing."""

    @abstractmethod
    def before_training(
        self, model: Model, kind: ModelKind, example: Example, settings: TrainingSettings, output: Path
    ) -> Before:
        """Return what `check_acts` and `save` need to know about the untrained model."""

    @abstractmethod
    def check_acts(self, model: Model, kind: ModelKind, example: Example, before: Before) -> None:
        """Raise CoppiceError if training changed no output for a training example."""

    @abstractmethod
    def restore(self, model: Model, checkpoint: Path, device: torch.device) -> None:
        """Load the trained weights in the folder of a checkpoint of this training into the model."""

    @abstractmethod
    def save(self, model: Model, reader: models.Reader, output: Path, before: Before, source: models.Source) -> None:
        """Write the trained weights and the reader's files to the folder `folder(output)`."""

    @abstractmethod
    def folder(self, output: Path) -> Path:
        """Return the folder of the trained weights, in the folder of the training."""


class Objective(ABC):
    """The loss that a training minimizes.

    Attributes:
        operations: per token of training, in addition to those of the trained model (those of a teacher).
        reported: name in the record -> a further loss, measured on the validation rows before and after training.
    """

    operations: float = 0
    reported: Mapping[str, Objective] = MappingProxyType({})

    def obstacle(self, engine: Engine) -> str:
        """Return why the objective cannot be computed with the engine of the model; "" if it can."""
        return ""

    @abstractmethod
    def summed_loss(self, engine: Engine, micro: MicroBatch) -> torch.Tensor:
        """Return the loss of a micro-batch, summed over its targets: a float32 scalar."""


class CrossEntropy(Objective):
    """The model's own loss: for text, the negative log-likelihood of the target tokens."""

    def summed_loss(self, engine: Engine, micro: MicroBatch) -> torch.Tensor:
        """Return the engine's loss."""
        return engine.summed_loss(micro)


@dataclass(frozen=True)
class Recovery:
    """A way to recover a pruned checkpoint."""

    trained: Trained[Any, Any]
    """Which weights change, and how they are saved."""
    objective: Objective
    """The loss that they minimize."""

    def operations(self, parameters: int) -> float:
        """Return the operations of training on one token, for a model with so many parameters."""
        return self.trained.operations * parameters + self.objective.operations


def outputs_of(model: LoadedModel, kind: ModelKind, example: Example) -> torch.Tensor:
    """Return a model's output for an example, without dropout, on the CPU."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        found = kind.outputs(model, kind.inputs([example], next(model.parameters()).device))
    model.train(training)
    return found.cpu()
