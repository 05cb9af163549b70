"""Choose the best checkpoint of a training: by the validation loss, or by a metric that the kind of model offers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import distributed

from coppice import models
from coppice.core.aliases import Record
from coppice.models.kinds import Decoding, Example, ModelKind
from coppice.models.rows import Row

if TYPE_CHECKING:
    from coppice.models.kinds import LoadedModel


class Found(NamedTuple):
    """What a training's history says about its validation.

    first: the first value; best: the best one; step: of the best one, the earliest if several are equal; loss: the
    validation loss at that step; first_loss: the first validation loss. All are None if nothing was validated.
    """

    first: float | None = None
    best: float | None = None
    step: int | None = None
    loss: float | None = None
    first_loss: float | None = None


@dataclass(frozen=True)
class BestBy:
    """The number by which checkpoints are compared.

    key: "loss", or the key of a metric in the kind's `validators`.
    """

    key: str = "loss"
    higher_is_better: bool = False

    @property
    def name(self) -> str:
        """Its name in Trainer's history."""
        return f"eval_{self.key}"

    def better(self, value: float, than: float | None) -> bool:
        """Return whether a value is better than another one, or the first."""
        return than is None or (value > than if self.higher_is_better else value < than)

    def found(self, history: Iterable[Record]) -> Found:
        """Return the first and the best value in a history of Trainer."""
        entries = [entry for entry in history if self.name in entry]
        if not entries:
            return Found()
        sign = -1 if self.higher_is_better else 1
        best = min(entries, key=lambda entry: (sign * entry[self.name], entry["step"]))
        first = entries[0]
        return Found(first[self.name], best[self.name], best["step"], best["eval_loss"], first["eval_loss"])


@dataclass(frozen=True)
class Asking:
    """Measures a metric on the validation rows: {eval_<key>: value}.

    Attributes:
        best_by: the metric.
        kind: of the model.
        reader: of the model.
        rows: the validation rows.
        decoding: how answers are generated.
    """

    best_by: BestBy
    kind: ModelKind
    reader: models.Reader
    rows: Sequence[Row]
    decoding: Decoding

    def measure(self, model: LoadedModel, whole: bool) -> dict[str, float]:
        """Return the metric, the same in every process.

        Args:
            model: with the weights so far.
            whole: whether each process runs all rows, because the processes share the model's weights. If not, each
                runs a part of the rows.
        """
        world = distributed.get_world_size() if distributed.is_initialized() and not whole else 1
        rank = distributed.get_rank() if world > 1 else 0
        validator = self.kind.validators[self.best_by.key]
        training = model.training
        model.eval()
        with torch.no_grad():
            own = validator.outputs(self.kind, model, self.reader, self.rows[rank::world], self.decoding)
        model.train(training)
        every: list[Sequence] = [own]
        if world > 1:
            every = [()] * world
            distributed.all_gather_object(every, own)
        # row i went to process i % world
        outputs = [every[place % world][place // world] for place in range(len(self.rows))]
        return {self.best_by.name: validator.value(outputs, self.rows)}


def asking(
    key: str, kind: ModelKind, reader: models.Reader, rows: Sequence[Row], validation: Sequence[Example]
) -> Asking:
    """Return what measures the metric `key`: greedily, with answers of at most as many tokens as the longest target."""
    longest = max(kind.targets([example]) for example in validation)
    best_by = BestBy(key, kind.validators[key].higher_is_better)
    return Asking(best_by, kind, reader, rows, Decoding(new_tokens=longest))
