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

from .grid import Plan, resolve, towers_of

if TYPE_CHECKING:
    from coppice.models.kinds import LoadedModel
    from coppice.models.towers import Batch

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
            for tower in towers_of(point, found):
                resolve(point, found, tower)
        except (SettingsError, CheckpointError) as error:
            errors.append(f"{model}: candidate {candidate}: {str(error).rstrip('.')}")  # joined by semicolons below
    if errors:
        raise SettingsError("; ".join(errors))


def prune(
    model: LoadedModel,
    point: dict[str, Any],
    batches: Iterable[Batch],
    *,
    context_length: int | None = None,
) -> PruneResult:
    """Prune `model` in place as `point` says; the same model and batches give the same result.

    Args:
        model: a loaded model.
        point: a grid point (see `grid.resolve`).
        batches: calibration batches of its towers, for a causal language model token ids [B, T] without padding.
            `magnitude` importance needs none.
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

    # all plans and checks first, because pruning a tower changes the configuration that it shares with the others
    plans = {anatomy.name: resolve(point, model.config, anatomy) for anatomy in towers_of(point, model.config)}
    every = {tower.anatomy.name: tower for tower in kinds.of(model.config).towers(model)}
    towers, plan = {name: every[name] for name in plans}, next(iter(plans.values()))
    for tower in towers.values():
        anatomy.check(tower)
    first = next(iter(towers.values()))
    batches = measures.checked_batches(first, batches, required=plan.needs_batches)
    before = footprint.measure(model, context_length)
    found = {name: methods.METHODS[own.method](own).prune(towers[name], batches) for name, own in plans.items()}
    after = footprint.measure(model, before["context_length"])
    facts = {
        "method": plan.method,
        "settings": plan.settings,
        "removed": measures.by_tower({name: removed for name, (removed, _) in found.items()}),
        "per_layer_shapes": measures.by_tower({name: measures.per_layer_shapes(t) for name, t in towers.items()}),
        **measures.facts_of_sizes(before, after),
        "sparsity": sparsity.measure(model),
        "importance": measures.by_tower({name: importance for name, (_, importance) in found.items()}),
        "calibration": {
            "sequences": sum(first.sequences(batch) for batch in batches),
            "tokens": sum(tower.tokens(batch) for tower in towers.values() for batch in batches),
        },
        "warnings": [warning for own in plans.values() for warning in own.warnings],
    }
    return PruneResult(model, facts)
