"""The pruning methods: what each removes, and how the model and its configuration follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coppice.pruning import anatomy
from coppice.pruning.importance import block_distances, magnitude, taylor
from coppice.pruning.points import Plan

# What each method's `score` returns: a name -> one tensor of scores a layer (or one for the whole model).
Importance = dict[str, list[torch.Tensor]]


class Method(ABC):
    """One way to prune. Lower importance goes first; equal importance, the lower index first."""

    def __init__(self, plan: Plan, layers_per_pass: int | None = None):
        self.plan = plan
        self.layers_per_pass = layers_per_pass

    @abstractmethod
    def score(self, model, batches: Sequence[torch.Tensor]) -> Importance:
        """Importance of each structure; the model is left as it was."""

    @abstractmethod
    def choose(self, importance: Importance) -> dict[str, Any]:
        """Indices of what goes, in the unpruned model's numbering."""

    @abstractmethod
    def apply(self, model, importance: Importance):
        """Remove from the model, in place, what `choose` names, and bring its configuration up to date."""

    @abstractmethod
    def summary(self, importance: Importance) -> dict[str, Any]:
        """The importance in a few numbers, for the record."""


class Depth(Method):
    """Removes whole blocks: those of lowest influence, or with `consecutive` the run that moves the state least."""

    def score(self, model, batches):
        if self.plan.settings["consecutive"]:
            distances = block_distances(model, batches, span=self.plan.remove["layers"], angular=True)
        else:
            distances = block_distances(model, batches)
        return {"layers": [distances]}

    def choose(self, importance):
        (scores,), count = importance["layers"], self.plan.remove["layers"]
        if self.plan.settings["consecutive"]:
            (first,) = _lowest(scores, 1)
            return {"layers": list(range(first, first + count))}
        return {"layers": _lowest(scores, count)}

    def apply(self, model, importance):
        removed = set(self.choose(importance)["layers"])
        kept = [index for index in range(len(anatomy.blocks(model))) if index not in removed]
        base, config = model.base_model, model.config
        base.layers = nn.ModuleList([base.layers[index] for index in kept])
        for index, block in enumerate(base.layers):
            for module in block.modules():
                if hasattr(module, "layer_idx"):  # the KV cache files keys and values under it
                    module.layer_idx = index
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [config.layer_types[index] for index in kept]
        return _configured(model, self.plan)

    def summary(self, importance):
        kind = "angular_distance" if self.plan.settings["consecutive"] else "block_influence"
        return {kind: importance["layers"][0].tolist()}


class Width(Method):
    """Removes MLP channels and KV groups: the same number in every layer, in each the least important ones."""

    def score(self, model, batches):
        parts = self.plan.settings["parts"]
        if self.plan.settings["importance"] == "magnitude":
            return magnitude(model, parts)
        return taylor(model, parts, batches, self.layers_per_pass)

    def choose(self, importance):
        return {
            part: [_lowest(scores, self.plan.remove[part]) for scores in layers] for part, layers in importance.items()
        }

    def apply(self, model, importance):
        for part, layers in self.choose(importance).items():
            for block, removed in zip(anatomy.blocks(model), layers, strict=True):
                stays = torch.ones(anatomy.count(block, part), dtype=torch.bool)
                stays[removed] = False
                anatomy.keep(block, part, stays.nonzero().flatten())
        return _configured(model, self.plan)

    def summary(self, importance):
        return {
            part: [_layer_summary(scores, self.plan.remove[part]) for scores in layers]
            for part, layers in importance.items()
        }


METHODS: dict[str, type[Method]] = {"depth": Depth, "width": Width}


def _lowest(scores: torch.Tensor, count: int) -> list[int]:
    """Indices of the `count` lowest scores, ascending by index."""
    return sorted(torch.argsort(scores, stable=True)[:count].tolist())


def _layer_summary(scores: torch.Tensor, removed: int) -> dict[str, float]:
    """Of one layer's scores; `removed_share` is the part of their sum that goes."""
    removed_sum = scores.sort().values[:removed].sum()
    return {
        "min": scores.min().item(),
        "median": scores.median().item(),
        "max": scores.max().item(),
        "removed_share": (removed_sum / scores.sum()).item() if scores.sum() > 0 else 0.0,
    }


def _configured(model, plan: Plan):
    for key, value in plan.changes.items():
        setattr(model.config, key, value)
    model.config.validate()
    return model
