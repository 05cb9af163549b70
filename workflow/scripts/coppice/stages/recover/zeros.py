"""Keep the zeros of a checkpoint that was pruned in single weights, and record what became of them.

`finetune.keep_sparsity` decides. Full fine-tuning would fill the zeros at its first step, and merging a LoRA adapter
adds a dense product to them. Checkpoints without such zeros are trained and merged as if this module did not exist.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core.errors import SettingsError
from coppice.models import sparsity
from coppice.models.kinds import Example, ModelKind

from .training_request import TrainingSettings

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("coppice.finetuning")

EXAMPLES = 256  # on which the loss is measured with the adapter beside the weights and merged under the mask
MASK, REFUSED, OFF = "mask", "merge-refused", "off"


def check(start: dict[str, Any] | None, settings: TrainingSettings, adapter: bool) -> None:
    """Reject settings that would fill the zeros of a checkpoint although `keep_sparsity` forbids it.

    Args:
        start: the zeros of the checkpoint, as from `sparsity.measure`.
        settings: how to train.
        adapter: whether an adapter is trained beside the weights.

    Raises:
        SettingsError: names the key.
    """
    if not sparsity.is_sparse(start) or settings.keep_sparsity != REFUSED or (adapter and not settings.merge):
        return
    what = "merging its adapter" if adapter else "training all of its weights"
    raise SettingsError(
        f"finetune.keep_sparsity: is {REFUSED}, but {what} would fill the zeros of this checkpoint "
        f"({sparsity.described(start)}). Set it to {MASK} to keep them or to {OFF} to lose them"
        f"{', or set finetune.merge to false' if adapter else ''}."
    )


def merged_folder(output: Path, start: dict[str, Any] | None, settings: TrainingSettings) -> Path:
    """Return the folder of the merged checkpoint, whose name says if it loses the zeros of its base."""
    loses = sparsity.is_sparse(start) and settings.keep_sparsity == OFF
    return output / (f"merged-{sparsity.DENSE}" if loses else "merged")


def mean_loss(model: nn.Module, kind: ModelKind, examples: Sequence[Example], token_limit: int) -> float:
    """Return the mean loss per target of examples, without dropout."""
    import torch

    model.eval()
    engine = kind.engine(model, token_limit)
    with torch.no_grad():
        total = sum(engine.summed_loss(micro).double().item() for micro in engine.micro_batches(examples))
    return total / kind.targets(examples)


def warnings(facts: dict[str, Any] | None) -> list[str]:
    """Return what reports must repeat about the zeros of a training. facts: the record's field `sparsity`."""
    if not facts or not sparsity.is_sparse(facts["before"]):
        return []
    before, after = facts["before"], facts["after"]
    if after and after["zeros"] < before["zeros"]:
        how = "merging the adapter" if facts["adapter"] else "fine-tuning"
        return [
            f"the pruned model has {sparsity.described(before)}, but {how} leaves {sparsity.described(after)}: the "
            "fine-tuned model is not sparse (finetune.keep_sparsity)"
        ]
    if not facts.get("mask_loss"):
        return []
    beside, masked = facts["mask_loss"]["adapter"], facts["mask_loss"]["masked"]
    return [
        "the fine-tuned model was measured with its adapter beside the sparse weights, which acts on the pruned "
        f"weights too; merged with the zeros kept, its loss is {masked:.4f} instead of {beside:.4f}"
    ]
