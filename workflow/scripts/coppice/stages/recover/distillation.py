"""Train a model to predict what a teacher predicts: by default the dense model that it was pruned from.

The teacher runs in the same process, frozen and without dropout, on the micro-batches of the student. It has no state,
so a resumed training needs nothing of it but its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coppice import models
from coppice.core import fingerprints
from coppice.core.aliases import Record
from coppice.core.errors import SettingsError
from coppice.models.kinds import Engine, Forward, MicroBatch, ModelKind
from coppice.study.settings.sections.finetune import Objective as Section

from .base import FORWARD, Objective
from .training_request import TrainingRequest, TrainingSettings

if TYPE_CHECKING:
    import torch

    from coppice.models.divergence import Mixture, Predictions

KL = "kl_to_teacher"  # in records: KL(teacher || student) per target of the validation rows, in nats


@dataclass(frozen=True)
class Teacher:
    """The model that a student learns from.

    Attributes:
        parameters: how many it has.
        engine: runs it; None for a training that is only planned.
    """

    parameters: int
    engine: Engine | None = None


@dataclass(frozen=True)
class Distillation(Objective):
    """A mixture of cross-entropy and the divergence from a teacher, over the whole vocabulary at target positions.

    Attributes:
        section: `finetune.objective`, which says what is mixed.
        teacher: whose predictions the student learns.
    """

    section: Section
    teacher: Teacher

    @property
    def operations(self) -> float:
        """Return the operations of the teacher's forward pass per token."""
        return FORWARD * self.teacher.parameters

    @property
    def reported(self) -> Mapping[str, Objective]:
        """Return the plain KL divergence, which compares trainings whatever mixture they minimize."""
        return {KL: replace(self, section=Section(ce=0, kl=1))}

    def obstacle(self, engine: Engine) -> str:
        """Return that the teacher's numbers would change in the arrangement of the student's engine, or ""."""
        own, other = engine.arrangement, self.teacher.engine.arrangement
        # A model that is exact in a prefix tree is so in padded rows, too, and every model is when it runs alone.
        order = ("tree", "sorted", "alone")
        if order.index(other) <= order.index(own):
            return ""
        return (
            f"finetune.arrangement: the examples are computed in the arrangement {own}, which would change the numbers "
            f"of the teacher (it needs {other}). Set it to sorted, or choose another finetune.objective.teacher."
        )

    def summed_loss(self, engine: Engine, micro: MicroBatch) -> torch.Tensor:
        """Return the loss, summed over the micro-batch's targets: a float32 scalar."""
        import torch

        from coppice.models import divergence

        with torch.no_grad():  # first, so that none of the student's activations are in memory yet
            theirs = _predictions(self.teacher.engine.forward, micro)
        ours = _predictions(engine.forward, micro)
        return divergence.summed_loss(ours, theirs, micro.targets.to(ours.states.device), _mixture(self.section))


def _predictions(forward: Forward, micro: MicroBatch) -> Predictions:
    from coppice.models.divergence import Predictions

    states, head = micro.run(forward), forward.head
    # `device_map` may put the output layer on another device than the last block
    return Predictions(states if head is None else states.to(head.weight.device), head)


def _mixture(section: Section) -> Mixture:
    from coppice.models.divergence import Mixture

    beta = {"forward": 0.0, "reverse": 1.0, "js": section.beta}[section.divergence]
    return Mixture(section.ce, section.kl, section.temperature, beta)


def prints_of(request: TrainingRequest, student: str) -> Record:
    """Return {teacher: fingerprint of its weights}; {} without a teacher. The checks need no weights in memory.

    Args:
        request: the training.
        student: fingerprint of the weights that are trained.

    Raises:
        SettingsError: The objective has no teacher that fits the student.
    """
    if not request.settings.objective.kl:
        return {}
    teacher, kind, key = request.teacher, models.kind_of(request.source), "finetune.objective"
    if not kind.distills:
        raise SettingsError(f"{key}.kl: {kind.noun} cannot be trained on a teacher's predictions. Set it to 0.")
    if teacher is None:
        raise SettingsError(f"{key}.teacher: kl is above 0, but there is no teacher. Name one, or set kl to 0.")
    if (other := models.kind_of(teacher)) is not kind:
        raise SettingsError(f"{key}.teacher: {teacher.path} is {other.noun}, but the student is {kind.noun}.")
    found = fingerprints.weights(teacher.path)
    if found == student:
        raise SettingsError(
            f"{key}.teacher: the teacher has the same weights as the student ({request.source.path}), so there is "
            "nothing to learn from it. Name another model."
        )
    if teacher.tokenizer().get_vocab() != request.source.tokenizer().get_vocab():
        raise SettingsError(
            f"{key}.teacher: the tokenizer of {teacher.path} has other tokens than the student's, so their "
            "predictions cannot be compared. Name a model with the same tokenizer."
        )
    ours, theirs = (models.skeleton(source).get_output_embeddings() for source in (request.source, teacher))
    if ours.weight.shape[0] != theirs.weight.shape[0]:
        raise SettingsError(
            f"{key}.teacher: the teacher predicts {theirs.weight.shape[0]} tokens and the student "
            f"{ours.weight.shape[0]}, although their tokenizers agree (one vocabulary is padded or resized). Name a "
            "model with as many rows in its output layer."
        )
    return {"teacher": found}


def load(source: models.Source, kind: ModelKind, settings: TrainingSettings, token_limit: int) -> Teacher:
    """Load a teacher, frozen and in evaluation mode."""
    model = models.load(source).requires_grad_(False)
    return Teacher(models.parameters(model), kind.engine(model, token_limit, settings.arrangement))
