"""The pruning methods: what each one removes, and how it changes the model and its configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coppice.models.towers import Tower

from . import anatomy, grid
from .grid import Plan
from .importance import activation, block_distances, column_norms, magnitude, taylor

# What `Method.score` returns: name -> one tensor of scores per layer (or one tensor for the whole model).
Importance = dict[str, list[torch.Tensor]]


class Method(ABC):
    """A way to prune. Removes the least important structures first and, of equally important ones, the lowest index."""

    def __init__(self, plan: Plan) -> None:
        """Prune a model as `plan` says."""
        self.plan = plan

    @abstractmethod
    def score(self, tower: Tower, batches: Sequence[torch.Tensor]) -> Importance:
        """Return the importance of each structure without changing the model."""

    @abstractmethod
    def choose(self, importance: Importance) -> dict[str, Any]:
        """Return the indices of what to remove, in the unpruned model's numbering."""

    @abstractmethod
    def apply(self, tower: Tower, importance: Importance) -> None:
        """Remove in place what `choose` returns, and update the model's configuration."""

    @abstractmethod
    def summary(self, importance: Importance) -> dict[str, Any]:
        """Return the importance in a few numbers, for the record."""


class Depth(Method):
    """Removes whole blocks: those of lowest influence or, with `consecutive`, the run that moves the state least."""

    def score(self, tower: Tower, batches: Sequence[torch.Tensor]) -> Importance:
        """Return how far each block, or each run of as many blocks as are removed, moves the hidden state."""
        if self.plan.settings["consecutive"]:
            distances = block_distances(tower, batches, span=self.plan.remove["layers"], angular=True)
        else:
            distances = block_distances(tower, batches)
        return {"layers": [distances]}

    def choose(self, importance: Importance) -> dict[str, Any]:
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

    def summary(self, importance: Importance) -> dict[str, Any]:
        """Return the scores themselves: there is only one for each block."""
        kind = "angular_distance" if self.plan.settings["consecutive"] else "block_influence"
        return {kind: importance["layers"][0].tolist()}


class Width(Method):
    """Removes the least important MLP channels and KV groups.

    Every layer loses as many or, with the ranking `global`, they are the least important of the whole model.
    """

    def score(self, tower: Tower, batches: Sequence[torch.Tensor]) -> Importance:
        """Return the importance of each channel and KV group, by the measure of the grid point."""
        measure, parts = self.plan.settings["importance"], self.plan.settings["parts"]
        return magnitude(tower, parts) if measure == "magnitude" else BY_DATA[measure](tower, parts, batches)

    def choose(self, importance: Importance) -> dict[str, Any]:
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

    def summary(self, importance: Importance) -> dict[str, Any]:
        """Return the range of each layer's scores and the share of them that is removed."""
        return {
            part: [
                _layer_summary(scores, count) for scores, count in zip(layers, self._counts(part, layers), strict=True)
            ]
            for part, layers in importance.items()
        }


class Unstructured(Method):
    """Sets single weights of the linear layers to zero: a share of each layer's, or two in every four."""

    def score(self, tower: Tower, batches: Sequence[torch.Tensor]) -> Importance:
        """Return the norm of each linear layer's inputs, by which its weights are ranked."""
        linears = _linears(tower)
        if self.plan.settings["importance"] == "magnitude":
            norms = dict.fromkeys(linears, torch.ones(()))  # magnitude ignores the inputs
        else:
            norms = column_norms(tower, linears, batches)
        return {"norms": [norms[linear] for linear in linears]}

    def choose(self, importance: Importance) -> dict[str, Any]:
        """Return the pattern or the share of the weights; their indices would fill the record."""
        return {"weights": self.plan.settings["pattern"] or self.plan.settings["ratio"]}

    @torch.no_grad()
    def apply(self, tower: Tower, importance: Importance) -> None:
        """Set the weights to zero."""
        for linear, norms in zip(_linears(tower), importance["norms"], strict=True):
            scores = linear.weight.abs().float() * norms.to(linear.weight.device)
            linear.weight[self._zeroed(scores)] = 0

    def _zeroed(self, scores: torch.Tensor) -> torch.Tensor:
        """Return a bool mask [rows, columns] of the weights to zero.

        Wanda zeroes the lowest scores of each row, magnitude those of the whole matrix, and the pattern 2:4 the two
        lowest of every four in a row.
        """
        rows, columns = scores.shape
        if self.plan.settings["pattern"] == "2:4":
            lowest = scores.view(rows, columns // 4, 4).argsort(dim=-1, stable=True)[..., :2]
            return torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(-1, lowest.cpu(), True).view_as(scores)
        if self.plan.settings["importance"] == "magnitude":
            scores = scores.view(1, -1)
        lowest = scores.argsort(dim=-1, stable=True)[:, : round(self.plan.settings["ratio"] * scores.shape[1])]
        return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, lowest.cpu(), True).view(rows, columns)

    def summary(self, importance: Importance) -> dict[str, Any]:
        """Return nothing: norms of inputs say little by themselves."""
        return {}


METHODS: dict[str, type[Method]] = {"depth": Depth, "width": Width, "unstructured": Unstructured}
BY_DATA = {"taylor": taylor, "activation": activation}


def _linears(tower: Tower) -> list[nn.Linear]:
    """Return the linear layers of the blocks, whose single weights are pruned."""
    return [module for module in tower.blocks.modules() if isinstance(module, nn.Linear)]


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
