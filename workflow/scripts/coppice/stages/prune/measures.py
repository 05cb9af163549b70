"""Per-layer shapes and sizes for `pruning.json`, and checks of calibration batches and importance scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from coppice.core.aliases import Record
from coppice.core.errors import CheckpointError, DataError
from coppice.models.towers import Batch, Tower

from . import anatomy


def per_layer_shapes(tower: Tower) -> dict[str, dict[str, int]]:
    """Return the widths of every layer by its index, in the format of transformers' `per_layer_config`."""
    shapes = {}
    for index, block in enumerate(tower.blocks):
        shapes[str(index)] = {}
        for part in tower.parts.values():
            shapes[str(index)] |= part.sizes(block, anatomy.count(block, part))
    return shapes


def by_tower(facts: dict[str, Record]) -> Record:
    """Return facts by the name of a tower; of a single tower, only its facts."""
    return facts if len(facts) > 1 else next(iter(facts.values()))


def checked_batches(tower: Tower, batches: Iterable[Batch], required: bool) -> list[Batch]:
    """Return the calibration batches as a list; raise DataError if they cannot be used."""
    batches = list(batches)
    if required and not batches:
        raise DataError(
            "pruning: there are no calibration batches, but this importance is measured on data. Pass batches or use "
            "importance 'magnitude'."
        )
    for index, batch in enumerate(batches):
        if problem := tower.problem(batch):
            raise DataError(f"pruning: calibration batch {index} {problem}.")
    return batches


def check_finite(importance: dict[str, list[torch.Tensor]]) -> None:
    """Raise CheckpointError, naming part and layer, if a score is not finite: sorting a NaN would prune at random."""
    for part, layers in importance.items():
        for index, scores in enumerate(layers):
            if not torch.isfinite(scores).all():
                where = f"layer {index}" if part != "layers" else f"layers {(~scores.isfinite()).nonzero().tolist()}"
                raise CheckpointError(
                    f"pruning: the importance of '{part}' in {where} is not finite, so the model's weights are damaged "
                    "or overflow in this dtype. Load the model in bfloat16 or float32, or replace its weights."
                )


def facts_of_sizes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes before and after pruning (from `footprint.measure`) in the form of the record."""
    return {
        "parameters": {"before": before["parameters"], "after": after["parameters"]},
        "active_parameters": {"before": before["active_parameters"], "after": after["active_parameters"]},
        "macs_per_token": {
            "context_length": before["context_length"],
            "linear": {"before": before["linear_macs"], "after": after["linear_macs"]},
            "attention": {"before": before["attention_macs"], "after": after["attention_macs"]},
        },
    }
