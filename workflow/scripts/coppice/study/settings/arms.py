"""The arms of an ablation: what an arm sets, laid over what all have, becomes the settings of one training.

An arm is written flat: keys of the adapter and keys of the training beside each other. While arms are put together,
`alpha` may be a multiple of a rank that is not decided yet; `settled` ends that.
"""

import re
from itertools import product

from coppice.core.errors import SettingsError

from . import lora_presets

TRAINING = ("learning_rate", "schedule", "weight_decay", "batch_size", "warmup_steps")
LASTING = ("epochs", "max_steps")
NAMED = ("name", "preset", "scheme")
ALL_WEIGHTS = "all"
MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)?r")


def flat(finetune):
    """The settings of an arm that changes nothing of the section `finetune`, its adapter resolved."""
    own = {key: finetune["lora"][key] for key in lora_presets.DEFAULTS}
    return {"train": "lora", **own, **{key: finetune[key] for key in TRAINING}}


def laid_over(below, arm):
    """`below` (flat) with the keys of `arm`: its preset or scheme first, then what it sets itself."""
    named = lora_presets.PRESETS.get(arm.get("preset"), {}) | lora_presets.SCHEMES.get(arm.get("scheme"), {})
    return below | named | {key: value for key, value in arm.items() if key not in NAMED}


def settled(settings):
    """Flat settings with `alpha` as a number; where all weights are trained, without what only an adapter has."""
    if settings["train"] == ALL_WEIGHTS:
        return {key: value for key, value in settings.items() if key not in lora_presets.DEFAULTS}
    return settings | {"alpha": scale(settings["alpha"], settings["r"])}


def scale(alpha, rank):
    """`alpha` as a number: itself, or so many times `rank` ("2r"). ValueError for another text."""
    if not isinstance(alpha, str):
        return alpha
    multiple = MULTIPLE.fullmatch(alpha.strip())
    if not multiple:
        return _whole(float(alpha))
    return _whole(float(multiple[1] or 1) * rank)


def _whole(number):
    return int(number) if number == int(number) else number


def section(finetune, settings):
    """The section `finetune` for one training with `settled` flat settings."""
    adapter = {"preset": None} | {key: settings[key] for key in lora_presets.DEFAULTS if key in settings}
    whole = finetune | {key: settings[key] for key in TRAINING} | {"lora": adapter}
    return whole | ({"train": ALL_WEIGHTS} if settings["train"] == ALL_WEIGHTS else {})


def shared(finetune):
    """What of the section `finetune` holds for all arms: each brings its own adapter and rates, and the budget says how
    long it trains.
    """
    return {key: value for key, value in finetune.items() if key not in (*TRAINING, *LASTING, "lora")}


def chosen_by(ablation):
    """(texts, tasks) that the metric by which an ablation ranks its arms is measured on."""
    metric, measured = ablation["choose_by"]["metric"], ablation["evaluate"]
    if metric == "average_acc":
        return [], measured["zero_shot"]["tasks"]
    if metric.startswith("ppl."):
        return [metric.removeprefix("ppl.")], []
    return [], [metric] if metric in measured["zero_shot"]["tasks"] else []


def combinations(values):
    """Every combination of key -> list of values, as name -> arm; names tell the keys where there are several."""
    keys = list(values)
    named = {}
    for chosen in product(*values.values()):
        parts = [
            _told(value) if len(keys) == 1 else f"{key}-{_told(value)}" for key, value in zip(keys, chosen, strict=True)
        ]
        name = ".".join(parts)
        if name in named:
            raise SettingsError(f"{', '.join(keys)}: {name} is there twice")
        named[name] = dict(zip(keys, chosen, strict=True))
    return named


def name_of(arm):
    """The name of an arm: its own, else made of its preset or scheme and of what it sets."""
    if arm.get("name"):
        return arm["name"]
    parts = [arm["preset"]] if arm.get("preset") else []
    parts += [f"scheme-{arm['scheme']}"] if arm.get("scheme") else []
    parts += ["all-weights"] if arm.get("train") == ALL_WEIGHTS else []
    parts += [f"{key}-{_told(value)}" for key, value in arm.items() if key not in (*NAMED, "train")]
    return ".".join(parts) or "unchanged"


def _told(value):
    if isinstance(value, list):
        return "+".join(map(_told, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
