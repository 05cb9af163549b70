"""The pruning methods: what each one removes, and how it changes the model and its configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from coppice.core.aliases import Record
from coppice.models.towers import Tower

from . import anatomy, grid, measures, unstructured
from .grid import Plan
from .importance import activation, block_distances, magnitude, taylor

# What `Structured.score` returns: name -> one tensor of scores per layer (or one tensor for the whole model).
Importance = dict[str, list[torch.Tensor]]


class Method(ABC):
    """A way to prune."""

    def __init__(self, plan: Plan) -> None:
        """Prune a model as `plan` says."""
        self.plan = plan

    @abstractmethod
    def prune(self, tower: Tower, batches: Sequence[torch.Tensor]) -> tuple[Record, Record]:
        """Prune in place; return what is removed and a summary of the importance, for the record."""


class Structured(Method):
    """Removes the least important structures first and, of equally important ones, the lowest index."""

    def prune(self, tower: Tower, batches: Sequence[torch.Tensor]) -> tuple[Record, Record]:
        """Score the structures, and remove the least important ones."""
        importance = self.score(tower, batches)
        measures.check_finite(importance)
        removed = self.choose(importance)
        self.apply(tower, importance)
        return removed, self.summary(importance)

    @abstractmethod
    def score(self, tower: Tower, batches: Sequence[torch.Tensor]) -> Importance:
        """Return the importance of each structure without changing the model."""

    @abstractmethod
    def choose(self, importance: Importance) -> Record:
        """Return the indices of what to remove, in the unpruned model's numbering."""

    @abstractmethod
    def apply(self, tower: Tower, importance: Importance) -> None:
        """Remove in place what `choose` returns, and update the model's configuration."""

    @abstractmethod
    def summary(self, importance: Importance) -> Record:
        """Return the importance in a few numbers, for the record."""


class Depth(Structured):
    """Removes whole blocks: those of lowest influence or, with `consecutive`, the run that moves the state least."""

    def score(self, tower: Tower, batches: Sequence[torch.Tensor]) -> Importance:
        """Return how far each block, or each run of as many blocks as are removed, moves the hidden state."""
        if self.plan.settings["consecutive"]:
            distances = block_distances(tower, batches, span=self.plan.remove["layers"], angular=True)
        else:
            distances = block_distances(tower, batches)
        return {"layers": [distances]}

    def choose(self, importance: Importance) -> Record:
        """Return the indices of the removed blocks."""
        (scores,), count = importance["layers"], self.plan.remove["layers"]
        if self.plan.settings["consecutive"]:
            (first,) = _lowest(scores, 1)
            return {"layers": list(range(first, first + count))}
        return {"layers": _lowest(scores, count)}

    def apply(self, tower: Tower, importance: Importance) -> None:
        """Remove the blocks."""
        removed = set(self.choose(importance)["layers"])
        tower.keep_blocks([index for index in range(len(tower.blocks)) if index not in removed])
        _configure(tower, self.plan)

    def summary(self, importance: Importance) -> Record:
        """Return the scores themselves: there is only one for each block."""
        kind = "angular_distance" if self.plan.settings["consecutive"] else "block_influence"
        return {kind: importance["layers"][0].tolist()}


class Width(Structured):
    """Removes the least important MLP channels and KV groups.

    Every layer loses as many or, with the ranking `global`, they are the least important of the whole model.
    """

    def score(self, tower: Tower, batches: Sequence[torch.Tensor]) -> Importance:
        """Return the importance of each channel and KV group, by the measure of the grid point."""
        measure, parts = self.plan.settings["importance"], self.plan.settings["parts"]
        return magnitude(tower, parts) if measure == "magnitude" else BY_DATA[measure](tower, parts, batches)

    def choose(self, importance: Importance) -> Record:
        """Return, for each part and layer, the indices of the removed structures."""
        return {
            part: [_lowest(scores, count) for scores, count in zip(layers, self._counts(part, layers), strict=True)]
            for part, layers in importance.items()
        }

    def _counts(self, part: str, layers: list[torch.Tensor]) -> list[int]:
        """Return the number of structures that each layer loses."""
        if self.plan.settings["ranking"] == "uniform":
            return [self.plan.remove[part]] * len(layers)
        return _global_counts(self._comparable(layers), self.plan.remove[part], grid.alignment(len(layers[0])))

    def _comparable(self, layers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return scores on one scale for all layers.

        Taylor scores already are, because each estimates a change of the same loss. Other scores depend on the scale of
        their layer, so they are divided by the layer's mean.
        """
        if self.plan.settings["importance"] == "taylor":
            return layers
        return [scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny) for scores in layers]

    def apply(self, tower: Tower, importance: Importance) -> None:
        """Cut the structures out of the blocks."""
        for name, layers in self.choose(importance).items():
            part = tower.parts[name]
            for block, removed in zip(tower.blocks, layers, strict=True):
                kept = torch.ones(anatomy.count(block, part), dtype=torch.bool)
                kept[removed] = False
                anatomy.keep(block, part, kept.nonzero().flatten())
        _configure(tower, self.plan)

    def summary(self, importance: Importance) -> Record:
        """Return the range of each layer's scores and the share of them that is removed."""
        return {
            part: [
                _layer_summary(scores, count) for scores, count in zip(layers, self._counts(part, layers), strict=True)
            ]
            for part, layers in importance.items()
        }


class Unstructured(Method):
    """Sets single weights of the linear layers to zero (see `unstructured`)."""

    def prune(self, tower: Tower, batches: Sequence[torch.Tensor]) -> tuple[Record, Record]:
        """Set the weights to zero; the record has the pattern or the share, since their indices would fill it."""
        unstructured.prune(tower, self.plan, batches)
        return {"weights": self.plan.settings["pattern"] or self.plan.settings["ratio"]}, {}


METHODS: dict[str, type[Method]] = {"depth": Depth, "width": Width, "unstructured": Unstructured}
BY_DATA = {"taylor": taylor, "activation": activation}


def _global_counts(layers: Sequence[torch.Tensor], total: int, align: int) -> list[int]:
    """Return how many structures each layer loses if the `total` lowest scores of all layers are removed.

    Every layer keeps at least one structure. Kept widths are rounded to multiples of `align`.
    """
    widths = [len(scores) for scores in layers]
    owner = torch.cat([torch.full((width,), index) for index, width in enumerate(widths)])
    counts = [0] * len(layers)
    for place in torch.argsort(torch.cat(list(layers)), stable=True).tolist():
        layer = int(owner[place])
        if sum(counts) == total:
            break
        if counts[layer] < widths[layer] - 1:
            counts[layer] += 1
    if align > 1:
        kept = [max(align, round((width - count) / align) * align) for width, count in zip(widths, counts, strict=True)]
        counts = [width - left for width, left in zip(widths, kept, strict=True)]
    return counts


def _lowest(scores: torch.Tensor, count: int) -> list[int]:
    """Return the indices of the `count` lowest scores in ascending order."""
    return sorted(torch.argsort(scores, stable=True)[:count].tolist())


def _layer_summary(scores: torch.Tensor, removed: int) -> dict[str, float]:
    """Summarize one layer's scores; `removed_share` is the share of their sum that is removed."""
    removed_sum = scores.sort().values[:removed].sum()
    return {
        "min": scores.min().item(),
        "median": scores.median().item(),
        "max": scores.max().item(),
        "removed_share": (removed_sum / scores.sum()).item() if scores.sum() > 0 else 0.0,
    }


def _configure(tower: Tower, plan: Plan) -> None:
    for key, value in plan.changes.items():
        setattr(tower.config, key, value)
    tower.config.validate()  # fail here rather than when somebody loads the saved checkpoint
