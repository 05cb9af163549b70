"""Prunes a causal language model in memory so that what remains is an ordinary checkpoint.

`prune` takes a loaded model and a point of the grid, removes whole blocks (`depth`) or MLP channels and
KV groups (`width`), and updates the configuration with it: after `save_pretrained` plain
`AutoModelForCausalLM.from_pretrained` loads the folder. Loading models, reading calibration data and writing
`pruning.json` are done elsewhere.

`points`: a point of the grid, checked against a model's configuration alone (imports no torch);
`anatomy`: which tensors of Llama, Qwen2, Qwen3 and Mistral belong to one structure; `importance`: how much a
structure matters; `methods`: what is removed; `measures`: shapes, and sizes before and after.

Torch-Pruning is not used: these families need two couplings, a few lines each, while its dependency graph is
traced through a forward and backward graph of the whole model and so needs all of it in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core import records
from coppice.core.errors import CheckpointError, SettingsError

from .grid import Plan, resolve

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "PruneResult", "check_grid", "prune", "resolve"]


@dataclass(frozen=True)
class PruneResult:
    """The pruned model (the same object that was passed in) and the facts for `pruning.json`, ready for JSON."""

    model: Any
    facts: dict[str, Any]


def check_grid(model, config, grid, output):
    """Refuse any point of the `grid` that the model cannot take, by its configuration alone.

    config: path of its config.json; grid: candidate -> point; output: the record to write. Raises SettingsError that
    names every such point.
    """
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(Path(config).parent, local_files_only=True)
    except Exception as error:  # values that nobody foresaw make transformers raise whatever comes of them
        raise SettingsError(f"{model}: {config} cannot be read as a model's configuration: {error}") from error
    plans, wrong = {}, []
    for candidate, point in grid.items():
        try:
            plan = resolve(point, found)
            plans[candidate] = {"remove": plan.remove, "warnings": plan.warnings}
        except (SettingsError, CheckpointError) as error:
            wrong.append(f"{model}: candidate {candidate}: {error}")
    if wrong:
        raise SettingsError("; ".join(wrong))
    records.write(output, {"model": model, "plans": plans})


def prune(
    model,
    point: dict[str, Any],
    batches: Iterable[torch.Tensor],
    *,
    context_length: int | None = None,
) -> PruneResult:
    """Prune `model` in place as `point` says.

    point: see `points.resolve`. batches: token ids, each LongTensor [B, T] without padding; deterministic given
    these; `magnitude` needs none. context_length: keys that a token attends to in the MACs of attention
    (default: 2048 or the model's own length, if shorter).

    Raises SettingsError for a point the model cannot take, DataError for unusable batches, CheckpointError for a
    model that cannot be pruned here. The model is unchanged when an error is raised before `apply`.
    """
    from coppice.models import footprint

    from . import anatomy, measures, methods  # these import torch; `resolve` must not

    plan = resolve(point, model.config)
    anatomy.check(model)
    batches = measures.checked_batches(batches, required=plan.needs_batches)
    before = footprint.measure(model, context_length)
    method = methods.METHODS[plan.method](plan)
    importance = method.score(model, batches)
    measures.check_finite(importance)
    removed = method.choose(importance)
    model = method.apply(model, importance)
    after = footprint.measure(model, before["context_length"])
    facts = {
        "method": plan.method,
        "settings": plan.settings,
        "removed": removed,
        "per_layer_shapes": measures.per_layer_shapes(model),
        **measures.facts_of_sizes(before, after),
        "importance": method.summary(importance),
        "calibration": {"sequences": sum(len(b) for b in batches), "tokens": sum(b.numel() for b in batches)},
        "warnings": plan.warnings,
    }
    return PruneResult(model, facts)
