"""Check what is trained against the kind of model: values of a model's section `finetune`, and arms of ablations."""

from collections.abc import Iterable, Mapping

from coppice.core.errors import SettingsError, nearest
from coppice.models import kinds

from . import arms
from .resolved import StudyAblation
from .sections.ablation import Start


def check_arms(key: str, start: Start, ablation: StudyAblation, kind: kinds.ModelKind) -> None:
    """Reject an arm with a value that the kind of model does not have, or with which it would learn nothing."""
    who = f"{kind.noun} ({start.model or start.checkpoint})"
    for name, member in ablation.arms.items():
        whole = arms.merged(ablation.base, member.changes)
        if whole["train"] != arms.ALL_WEIGHTS:
            towers = whole.get("towers", ablation.finetune.lora.towers)
            check_towers(towers, kind, who, f"{key}: arm '{name}': towers")
        check_batch(whole["batch_size"], kind, who, f"{key}: arm '{name}': batch_size")


def check_towers(towers: Mapping[str, object], kind: kinds.ModelKind, who: str, key: str) -> None:
    """Reject adapters of towers that a kind of model does not have, and towers that are all frozen.

    Args:
        towers: tower -> how it is trained; `frozen` says that it is not.
        kind: of the model.
        who: the model, for the message.
        key: the key of the towers, for the message.
    """
    for tower in towers:
        if tower not in kind.tower_names:
            reject(key, tower, f"{who} has the towers", kind.tower_names)
    if all(towers.get(name, "frozen" if name in kind.frozen_towers else None) == "frozen" for name in kind.tower_names):
        raise SettingsError(f"{key}: all towers of {who} are frozen; give one an adapter")


def check_batch(batch_size: int, kind: kinds.ModelKind, who: str, key: str) -> None:
    """Reject a batch of one for a kind that learns by comparing examples. who, key: for the message."""
    if kind.coupled and batch_size < 2:
        raise SettingsError(
            f"{key}: {who} learns by comparing the pairs of a step, so a step of one teaches nothing; use at least 2, "
            "and better as many as fit"
        )


def reject(key: str, found: str, words: str, valid: Iterable[str]) -> None:
    """Raise SettingsError for a value that is not among the valid ones; words introduce these."""
    valid = list(valid)
    raise SettingsError(f"{key}: found '{found}', but {words} {', '.join(valid)}{nearest(found, valid)}")
