"""The pruning methods: what each one removes, and how it changes the model and its configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from coppice.core.aliases import Record
from coppice.models.towers import Batch, Tower

from . import anatomy, grid, measures, unstructured
from .grid import Plan
from .importance import activation, block_distances, block_perplexities, block_taylor, magnitude, taylor

# part -> one tensor of scores per layer
Importance = dict[str, list[torch.Tensor]]


class Method(ABC):
    """A way to prune."""

    def __init__(self, plan: Plan) -> None:
        """Prune a model as `plan` says."""
        self.plan = plan

    @abstractmethod
    def prune(self, tower: Tower, batches: Sequence[Batch]) -> tuple[Record, Record]:
        """Prune in place; return what is removed and a summary of the importance, for the record."""


class Depth(Method):
    """Removes whole blocks: the least important ones or, with `consecutive`, the run that moves the state least.

    Of equally important blocks, the first goes. With `steps`, an equal share goes at a time, and the importance is
    measured again on what is left.
    """

    def prune(self, tower: Tower, batches: Sequence[Batch]) -> tuple[Record, Record]:
        """Remove the blocks; the record has the scores of the dense model's blocks, or runs of blocks."""
        layers, summary = list(range(len(tower.blocks))), {}
        dense, steps = len(layers), self.plan.settings["steps"]
        for step in range(1, steps + 1):
            count = self.plan.remove["layers"] * step // steps - (dense - len(layers))
            if not count:
                continue
            scores = self._scores(tower, batches)
            measures.check_finite({"layers": [scores]})
            summary = summary or {self._measure(): scores.tolist()}
            gone = self._lowest(scores, count, layers, dense)
            kept = [place for place in range(len(layers)) if place not in gone]
            tower.keep_blocks(kept)
            layers = [layers[place] for place in kept]
        _configure(tower, self.plan)
        return {"layers": [index for index in range(dense) if index not in layers]}, summary

    def _measure(self) -> str:
        return "angular_distance" if self.plan.settings["consecutive"] else BLOCK_MEASURES[self._importance][0]

    @property
    def _importance(self) -> str:
        return self.plan.settings["importance"]

    def _scores(self, tower: Tower, batches: Sequence[Batch]) -> torch.Tensor:
        """Return the importance of each block, or of each run of as many blocks as are removed, by its first block."""
        if self.plan.settings["consecutive"]:
            return block_distances(tower, batches, span=self.plan.remove["layers"], angular=True)
        return BLOCK_MEASURES[self._importance][1](tower, batches)

    def _lowest(self, scores: torch.Tensor, count: int, layers: Sequence[int], dense: int) -> set[int]:
        """Return the places of the blocks to remove next; `layers` are the dense model's indices of all blocks."""
        span = count if self.plan.settings["consecutive"] else 1
        keep = self.plan.settings["keep_blocks"]
        free = [
            i for i in range(len(scores)) if layers[i] >= keep["first"] and layers[i] + span <= dense - keep["last"]
        ]
        chosen = _lowest(scores[free], count // span)
        return {free[i] + offset for i in chosen for offset in range(span)}


class Width(Method):
    """Removes the least important structures of parts, and of equally important ones, those of lower index.

    Every layer loses as many or, with the ranking `global`, they are the least important of all layers. The layers of
    `keep_blocks` lose none. With `steps`, an equal share goes at a time, and the importance is measured again.
    """

    def prune(self, tower: Tower, batches: Sequence[Batch]) -> tuple[Record, Record]:
        """Cut the structures out of the blocks; the record has a summary of the dense model's importance."""
        parts, steps, summary = [*self.plan.remove], self.plan.settings["steps"], {}
        left = {part: [list(range(anatomy.count(b, tower.parts[part]))) for b in tower.blocks] for part in parts}
        dense = {part: [list(layer) for layer in layers] for part, layers in left.items()}
        for step in range(1, steps + 1):
            importance = self._importance(tower, batches)
            measures.check_finite(importance)
            counts = {part: self._counts(part, scores, dense[part], step) for part, scores in importance.items()}
            summary = summary or {
                part: [_layer_summary(*layer) for layer in zip(scores, counts[part], strict=True)]
                for part, scores in importance.items()
            }
            for part, layers in importance.items():
                for index, (scores, count) in enumerate(zip(layers, counts[part], strict=True)):
                    gone = set(_lowest(scores, count))
                    kept = [place for place in range(len(scores)) if place not in gone]
                    anatomy.keep(tower.blocks[index], tower.parts[part], torch.tensor(kept))
                    left[part][index] = [left[part][index][place] for place in kept]
        _configure(tower, self.plan)
        removed = {
            part: [sorted({*layer} - {*stays}) for layer, stays in zip(dense[part], left[part], strict=True)]
            for part in parts
        }
        return removed, summary

    def _importance(self, tower: Tower, batches: Sequence[Batch]) -> Importance:
        """Return the importance of each structure, by the measure of the grid point."""
        measure, parts = self.plan.settings["importance"], [*self.plan.remove]
        if measure == "magnitude":
            found = magnitude(tower, parts)
        elif measure == "activation":
            found = activation(tower, parts, batches)
        else:
            found = taylor(tower, parts, batches, measure)
        for part in parts:
            if tower.parts[part].alike:  # a structure is as important as it is in all blocks together
                found[part] = [sum(self._comparable(found[part]))] * len(found[part])
        return found

    def _counts(self, part: str, layers: list[torch.Tensor], dense: list[list[int]], step: int) -> list[int]:
        """Return the number of structures that each layer loses in a step."""
        keep, steps = self.plan.settings["keep_blocks"], self.plan.settings["steps"]
        free = range(keep["first"], len(layers) - keep["last"])
        due = self.plan.remove[part] * step // steps
        counts = [0] * len(layers)
        if self.plan.settings["ranking"] == "uniform":
            for index in free:
                counts[index] = due - (len(dense[index]) - len(layers[index]))
            return counts
        gone = sum(len(dense[index]) - len(layers[index]) for index in free)
        align = grid.alignment(len(dense[0])) if step == steps else 1
        found = _global_counts(self._comparable([layers[index] for index in free]), due - gone, align)
        for index, count in zip(free, found, strict=True):
            counts[index] = count
        return counts

    def _comparable(self, layers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return scores on one scale for all layers.

        Taylor scores already are, because each estimates a change of the same loss. Other scores depend on the scale of
        their layer, so they are divided by the layer's mean.
        """
        if self.plan.settings["importance"].startswith("taylor"):
            return layers
        return [scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny) for scores in layers]


class Unstructured(Method):
    """Sets single weights of the linear layers to zero (see `unstructured`)."""

    def prune(self, tower: Tower, batches: Sequence[Batch]) -> tuple[Record, Record]:
        """Set the weights to zero; the record has the pattern or the share, since their indices would fill it."""
        unstructured.prune(tower, self.plan, batches)
        return {"weights": self.plan.settings["pattern"] or self.plan.settings["ratio"]}, {}


METHODS: dict[str, type[Method]] = {"depth": Depth, "width": Width, "unstructured": Unstructured}
# importance of depth -> its name in the record, and the function
BLOCK_MEASURES = {
    "block-influence": ("block_influence", block_distances),
    "perplexity": ("perplexity", block_perplexities),
    "taylor": ("taylor", block_taylor),
}


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
        kept = [
            # no more than are left: earlier steps do not round
            min(max(align, round((width - count) / align) * align), width // align * align)
            for width, count in zip(widths, counts, strict=True)
        ]
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
