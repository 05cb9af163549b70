"""Prune a model in memory, so that it can be saved as an ordinary checkpoint.

`prune` takes a loaded model and a grid point. It removes whole blocks (`depth`), removes MLP channels and KV groups
(`width`) or sets single weights to zero (`unstructured`), and updates the configuration to match. After
`save_pretrained`, plain transformers loads the folder; only layers of different widths
(`ranking: global`) need `models.pruned_shapes`. `prune` does not load models, read calibration data or write
`pruning.json`; `candidates` does.

The kind of the model says which tower of blocks is pruned, and which tensors belong to one structure (see
`models.towers`). `grid` checks a grid point against a model's configuration alone (without torch); `anatomy` cuts
structures out of blocks; `importance` scores structures, with gradients from `blockwise`; `methods` decides what to
remove and removes it; `unstructured` prunes single weights, by sums from `layer_inputs` and with `sparsegpt`;
`measures` describes shapes and sizes.

This package does not use Torch-Pruning. These families need only two kinds of coupled structures, a few lines each,
whereas Torch-Pruning traces a forward and backward pass through the whole model and so needs all of it in memory at
once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core.errors import CheckpointError, SettingsError

from .grid import Plan, resolve

if TYPE_CHECKING:
    import torch

    from coppice.models.kinds import LoadedModel

__all__ = ["Plan", "PruneResult", "check_grid", "prune", "resolve"]


@dataclass(frozen=True)
class PruneResult:
    """The pruned model (the object that was passed in) and the JSON-ready facts for `pruning.json`."""

    model: Any
    facts: dict[str, Any]


def check_grid(model: str, config: str | Path, grid: dict[str, dict[str, Any]]) -> None:
    """Reject grid points that the model cannot take. This reads no weights and does not import torch.

    Args:
        model: name of the model, for messages.
        config: path of the model's config.json.
        grid: candidate name -> grid point.

    Raises:
        SettingsError: names every point that the model cannot take.
    """
    if not grid:
        return
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(Path(config).parent, local_files_only=True)
    except Exception as error:  # transformers does not validate every value, so a bad one can raise anything
        raise SettingsError(
            f"{model}: {config} cannot be read as a model configuration: {error}. Restore the model's own config.json."
        ) from error
    errors = []
    for candidate, point in grid.items():
        try:
            resolve(point, found)
        except (SettingsError, CheckpointError) as error:
            errors.append(f"{model}: candidate {candidate}: {str(error).rstrip('.')}")  # joined by semicolons below
    if errors:
        raise SettingsError("; ".join(errors))


def prune(
    model: LoadedModel,
    point: dict[str, Any],
    batches: Iterable[torch.Tensor],
    *,
    context_length: int | None = None,
) -> PruneResult:
    """Prune `model` in place as `point` says; the same model and batches give the same result.

    Args:
        model: a loaded causal language model.
        point: a grid point (see `grid.resolve`).
        batches: calibration token ids, each LongTensor [B, T] without padding. `magnitude` importance needs none.
        context_length: number of keys that a token attends to when attention MACs are counted (default: 2048, or the
            model's context length if that is shorter).

    Raises:
        SettingsError: the model cannot take the point.
        DataError: the batches cannot be used.
        CheckpointError: the model cannot be pruned here.

    If the weights or the importance are not finite, an error of `depth` and `width` leaves the model unchanged; Wanda
    and SparseGPT find out only when the blocks before are pruned.
    """
    from coppice.models import footprint, kinds, sparsity

    # These modules import torch. `resolve` runs when Snakemake parses the workflow, so this package must not.
    from . import anatomy, measures, methods

    plan = resolve(point, model.config)
    tower = kinds.of(model.config).towers(model)[0]
    anatomy.check(tower)
    batches = measures.checked_batches(batches, required=plan.needs_batches)
    before = footprint.measure(model, context_length)
    method = methods.METHODS[plan.method](plan)
    removed, importance = method.prune(tower, batches)
    after = footprint.measure(model, before["context_length"])
    facts = {
        "method": plan.method,
        "settings": plan.settings,
        "removed": removed,
        "per_layer_shapes": measures.per_layer_shapes(tower),
        **measures.facts_of_sizes(before, after),
        "sparsity": sparsity.measure(model),
        "importance": importance,
        "calibration": {"sequences": sum(len(b) for b in batches), "tokens": sum(b.numel() for b in batches)},
        "warnings": plan.warnings,
    }
    return PruneResult(model, facts)
