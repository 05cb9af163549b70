"""What runs a model for the stages: the engine of a training, and the scorer of an evaluation.

A kind of model (`kinds`) has them, and this module says what the stages expect of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

Example = dict[str, Any]
Inputs = dict[str, Any]


class Forward(Protocol):
    """Runs one model on micro-batches. An engine has one for its model, and an objective may have another's."""

    device: torch.device


@dataclass(frozen=True)
class MicroBatch:
    """A part of the targets of one optimizer step, small enough to fit in memory.

    Attributes:
        run: runs the model of a Forward and returns the states [N, width] that predict the targets (logits, if the
            model changes them after its output layer). An objective may run a second model, such as a teacher, on the
            same tokens.
        targets: what the states predict, [N].
        tokens: the number of tokens that the model is run on, padding included.
    """

    run: Callable[[Forward], torch.Tensor]
    targets: torch.Tensor
    tokens: int

    def without_targets(self) -> MicroBatch:
        """Return the same run of the model without any target, so that all its gradients are zero."""
        return MicroBatch(lambda forward: self.run(forward)[:0], self.targets[:0], self.tokens)


@dataclass(frozen=True)
class Fallback:
    """Why an accelerator is not used for a model, and how the model must then be run.

    Attributes:
        reason: why the accelerator would not be exact; a clause such as "its local attention is cut by ...".
        alone: True if each text must have a pass of its own, because texts of different lengths in one batch change
            each other's numbers.
        forget: makes the model forget what it keeps from earlier passes; called before a series of passes.
    """

    reason: str
    alone: bool
    forget: Callable[[], None]


class Engine(Protocol):
    """Computes the summed loss of the examples of one optimizer step, micro-batch by micro-batch.

    The sum over the micro-batches, divided by the number of targets in the step, is the loss of the step. An engine
    whose loss is no sum over examples (a contrastive loss) computes what couples them in `micro_batches`, which is
    called once for each step.

    Attributes:
        forward: runs the engine's model.
        arrangement: how examples are arranged, for the record.
        warnings: what a reader of the training's record must know about the arrangement, in sentences.
        token_limit: the most tokens in a micro-batch; an example that is longer runs alone. It may be lowered at any
            time.
    """

    forward: Forward
    arrangement: str
    warnings: Sequence[str]
    token_limit: int

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of some examples; each target is in exactly one of them."""

    def summed_loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the summed loss of a micro-batch's targets: a float32 scalar."""


class Scorer(Protocol):
    """Scores continuations of contexts.

    Attributes:
        alone: True if texts of different lengths in one batch change each other's numbers. The scorer heeds that by
            itself; whoever runs other batches must too.
    """

    alone: bool

    def score(
        self, requests: Sequence[tuple[list[int], list[int]]], label: str = "", quiet: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy continuation) of each (input ids, continuation ids)."""
