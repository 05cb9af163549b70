"""The two objects that the steps of a training pass to each other: the job, and the model that is to be trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core.aliases import Record
from coppice.models import kinds

from .base import Recovery
from .training_request import TrainingRequest, TrainingSettings

if TYPE_CHECKING:
    from coppice.models.kinds import LoadedModel

EXAMPLE_LOSSES_FILE = "validation_losses.json"
RUNG_LOSS_FILE = "reached.json"


@dataclass(frozen=True)
class Job:
    """One training, as each of its processes receives it.

    request: what is asked for; settings: how to train; key: a digest of everything that
    affects what is learned; prints: fingerprints of weights, tokenizer and data sets; resume: the checkpoint folder to
    continue from; token_limit: the most tokens in one forward pass.
    """

    request: TrainingRequest
    settings: TrainingSettings
    key: str
    prints: Record
    resume: Path | None = None
    token_limit: int = 0


@dataclass(frozen=True)
class Learner:
    """A model that is ready to be trained.

    kind: the kind of the model; recovery: what is done with it; settings: those of the job, with the training length
    worked out; sharded: whether the processes share the frozen weights; counts: {trainable, all, base}_parameters and
    more about them;
    zeros: those of the checkpoint, as from `sparsity.measure`.
    """

    model: LoadedModel
    kind: kinds.ModelKind
    recovery: Recovery
    settings: TrainingSettings
    sharded: bool
    counts: Record
    zeros: Record | None = None
