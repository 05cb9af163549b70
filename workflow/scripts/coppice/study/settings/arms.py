"""Arms of an ablation: combine an arm's own settings with the common ones into the settings of one training.

An arm is a flat mapping with adapter keys and training keys side by side. While arms are combined, `alpha` may be a
multiple of the rank such as "2r", because a later stage may still change the rank; `resolved` makes it a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING

from coppice.core.aliases import Record
from coppice.core.errors import SettingsError
from coppice.stats import metrics

from . import lora_presets

if TYPE_CHECKING:
    from .sections.ablation import ChooseBy
    from .sections.evaluate import Evaluate
    from .sections.finetune import Finetune

TRAINING = ("learning_rate", "schedule", "weight_decay", "batch_size", "warmup_steps")
LASTING = ("epochs", "max_steps")
NAMED = ("name", "preset", "scheme")
ADAPTER = (*lora_presets.DEFAULTS, "towers")  # keys of an arm that are about its adapter
ALL_WEIGHTS = "all"
MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)?r")


def flat(finetune: Finetune) -> Record:
    """Return the flat settings of an arm that changes nothing. finetune: the section, its adapter resolved."""
    own = {key: getattr(finetune.lora, key) for key in lora_presets.DEFAULTS}
    return {"train": "lora", **own, **{key: getattr(finetune, key) for key in TRAINING}}


def merged(below: Record, arm: Record) -> Record:
    """Return the flat settings `below`, overridden by the arm's preset or scheme and then by the arm's own keys."""
    named = lora_presets.PRESETS.get(arm.get("preset"), {}) | lora_presets.SCHEMES.get(arm.get("scheme"), {})
    return below | named | {key: value for key, value in arm.items() if key not in NAMED}


def resolved(settings: Record) -> Record:
    """Return flat settings with `alpha` as a number. If all weights are trained, the adapter's keys are dropped."""
    if settings["train"] == ALL_WEIGHTS:
        return {key: value for key, value in settings.items() if key not in ADAPTER}
    return settings | {"alpha": scale(settings["alpha"], settings["r"])}


def scale(alpha: str | float, rank: int) -> float:
    """Return `alpha` as a number; "2r" means two times `rank`. Raises ValueError for any other text."""
    if not isinstance(alpha, str):
        return alpha
    multiple = MULTIPLE.fullmatch(alpha.strip())
    if not multiple:
        return _whole(float(alpha))
    return _whole(float(multiple[1] or 1) * rank)


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def section(finetune: Finetune, settings: Record) -> Record:
    """Return the section `finetune` for one training. settings: flat, as `resolved` returns them."""
    adapter = {"preset": None} | {key: settings[key] for key in lora_presets.DEFAULTS if key in settings}
    whole = finetune.model_dump() | {key: settings[key] for key in TRAINING}
    whole["lora"] = adapter | _towers(settings if "towers" in settings else whole["lora"])
    return whole | ({"train": ALL_WEIGHTS} if settings["train"] == ALL_WEIGHTS else {})


def shared(finetune: Record) -> Record:
    """Return the part of the section `finetune` that all arms share.

    Each arm has its own adapter and training settings, and the ablation's budget replaces epochs and steps. The
    adapters of single towers are those of all arms that do not give others.
    """
    common = {key: value for key, value in finetune.items() if key not in (*TRAINING, *LASTING, "lora")}
    towers = _towers(finetune["lora"])
    return common | ({"lora": towers} if towers else {})


def _towers(lora: Record) -> Record:
    """Return the part of the section `finetune.lora` about single towers; empty without one."""
    return {key: lora[key] for key in ("towers",) if lora.get(key)}


def chosen_by(choose_by: ChooseBy, evaluate: Evaluate) -> dict[str, dict[str, list[str]]]:
    """Return section of `evaluate` -> key -> data sets, reduced to those that rank the arms; all empty for the loss.

    Sections that name no data set are left out.
    """
    ranking, chosen = metrics.named(choose_by.metric), {}
    for section, key in {entry.setting: None for entry in metrics.METRICS if entry.setting}:
        if names := getattr(getattr(evaluate, section, None), key, ()):
            kept = (section, key) == ranking.setting
            chosen[section] = {key: [name for name in names if kept and (ranking.mean_of or name in ranking.names)]}
    return chosen


def combinations(values: Mapping[str, Iterable[object]]) -> dict[str, Record]:
    """Return {name: arm} for every combination of values.

    Args:
        values: key -> list of values. If there are several keys, the arms' names contain the keys.
    """
    keys = list(values)
    named = {}
    for chosen in product(*values.values()):
        parts = [
            _text(value) if len(keys) == 1 else f"{key}-{_text(value)}" for key, value in zip(keys, chosen, strict=True)
        ]
        name = ".".join(parts)
        if name in named:
            raise SettingsError(f"{', '.join(keys)}: {name} appears twice; remove one of them")
        named[name] = dict(zip(keys, chosen, strict=True))
    return named


def name_of(arm: Record) -> str:
    """Return the name of an arm: its own, else one made from its preset or scheme and the keys it sets."""
    if arm.get("name"):
        return arm["name"]
    parts = [arm["preset"]] if arm.get("preset") else []
    parts += [f"scheme-{arm['scheme']}"] if arm.get("scheme") else []
    parts += ["all-weights"] if arm.get("train") == ALL_WEIGHTS else []
    parts += [f"{key}-{_text(value)}" for key, value in arm.items() if key not in (*NAMED, "train")]
    return ".".join(parts) or "unchanged"


def _text(value: object) -> str:
    """Return a value as it appears in an arm's name."""
    if isinstance(value, list):
        return "+".join(map(_text, value))
    if isinstance(value, dict):
        return "+".join(f"{key}-{_text(one)}" for key, one in value.items() if one is not None) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
