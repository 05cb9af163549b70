"""A point of the pruning grid, checked against a model's configuration: no weights are read, no torch imported.

So the workflow can refuse a point that a model cannot take before any job starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from coppice.core.errors import CheckpointError, SettingsError, nearest

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
KEYS = {
    "depth": {"ratio", "consecutive"},
    "width": {"ratio", "importance", "parts", "ranking"},
    "unstructured": {"ratio", "importance", "pattern"},
}
IMPORTANCES = {"width": ("taylor", "activation", "magnitude"), "unstructured": ("wanda", "magnitude")}
RANKINGS = ("uniform", "global")
PATTERNS = (None, "2:4")
PARTS = ("mlp", "attention")
# From this width on, MLP widths are kept at a multiple of 8: GPUs' matrix units lose speed on others.
ALIGN_FROM, ALIGN_TO = 1024, 8


@dataclass(frozen=True)
class Plan:
    """What a point means for one model.

    settings: the point with its defaults filled in. remove: how many structures go, `{"layers": n}` for depth,
    `{"mlp": channels, "attention": KV groups}` (per layer) for width. changes: new values of the configuration.
    """

    method: str
    settings: dict[str, Any]
    remove: dict[str, int]
    changes: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def needs_batches(self) -> bool:
        return self.settings.get("importance") != "magnitude"  # depth has none, and needs them


def resolve(point: dict[str, Any], config) -> Plan:
    """The plan of one point for a model with this configuration.

    point: `{"method": "depth", "ratio": 0.25, "consecutive": false}`, `{"method": "width", "ratio": 0.5, "importance":
    "taylor" | "activation" | "magnitude", "parts": ["mlp", "attention"], "ranking": "uniform" | "global"}` (default:
    taylor, mlp alone, uniform) or `{"method": "unstructured", "ratio": 0.5, "importance": "wanda" | "magnitude",
    "pattern": null | "2:4"}` (default: wanda); `name` is allowed and not used here.

    Depth removes round(ratio * layers) blocks, at least 1. Width removes round(ratio * intermediate_size) channels, the
    kept width rounded to a multiple of 8 from 1024 on, and floor(ratio * num_key_value_heads) KV groups with their
    query heads, the same number in every layer; ranked globally, the same shares of all layers' together, so that
    layers differ (an odd-shaped checkpoint).

    Raises SettingsError naming the key, the value and what would work; CheckpointError for another architecture.
    """
    method = point.get("method")
    if method not in KEYS:
        raise SettingsError(f"pruning method {method!r} is not one of {sorted(KEYS)}{nearest(method, KEYS)}")
    for key in point:
        if key not in KEYS[method] | {"method", "name"}:
            raise SettingsError(
                f"prune point {point}: '{key}' is not a key of method '{method}', which takes "
                f"{sorted(KEYS[method])}{nearest(key, KEYS[method])}"
            )
    ratio = point.get("ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise SettingsError(f"prune point {point}: 'ratio' is {ratio!r}, but must be a number between 0 and 1")
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"{config.name_or_path or type(config).__name__}: models of type '{config.model_type}' cannot be pruned "
            f"here, only {', '.join(FAMILIES)}; prune it with another tool and give the result in candidates.table"
        )
    return {"depth": _depth, "width": _width, "unstructured": _unstructured}[method](point, ratio, config)


def _depth(point, ratio, config) -> Plan:
    consecutive = point.get("consecutive", False)
    if not isinstance(consecutive, bool):
        raise SettingsError(f"prune point {point}: 'consecutive' is {consecutive!r}, but must be true or false")
    layers = config.num_hidden_layers
    count = max(1, round(ratio * layers))
    if count >= layers:
        raise SettingsError(
            f"prune point {point}: removing {count} of {layers} layers would leave none; a model of {layers} "
            "layers keeps at least one, so lower 'ratio'"
        )
    settings = {"method": "depth", "ratio": ratio, "consecutive": consecutive}
    return Plan("depth", settings, {"layers": count}, {"num_hidden_layers": layers - count})


def _width(point, ratio, config) -> Plan:
    importance, parts = _one_of(point, "importance", "taylor", IMPORTANCES["width"]), point.get("parts", ["mlp"])
    ranking = _one_of(point, "ranking", "uniform", RANKINGS)
    if not isinstance(parts, list | tuple) or not parts or not set(parts) <= set(PARTS):
        raise SettingsError(f"prune point {point}: 'parts' is {parts!r}, but must list some of {list(PARTS)}")
    parts = [part for part in PARTS if part in parts]
    settings = {"method": "width", "ratio": ratio, "importance": importance, "parts": parts, "ranking": ranking}
    if ranking == "global":  # the layers then differ: the configuration keeps the dense numbers
        sizes = {"mlp": config.intermediate_size, "attention": config.num_key_value_heads}
        remove = {part: math.floor(ratio * sizes[part] * config.num_hidden_layers + 1e-9) for part in parts}
        _check_removes(point, remove, config)
        return Plan("width", settings, remove, {})
    remove, changes, warnings = {}, {}, []
    if "mlp" in parts:
        kept = _kept_channels(ratio, config.intermediate_size)
        remove["mlp"], changes["intermediate_size"] = config.intermediate_size - kept, kept
    if "attention" in parts:
        remove["attention"] = _removed_groups(point, ratio, config)
        changes |= _head_counts(config, config.num_key_value_heads - remove["attention"])
    _check_removes(point, remove, config)
    warnings += [f"ratio {ratio} removes nothing from '{p}' ({_sizes(config)})" for p in parts if not remove[p]]
    return Plan("width", settings, remove, changes, warnings)


def _unstructured(point, ratio, config) -> Plan:
    importance = _one_of(point, "importance", "wanda", IMPORTANCES["unstructured"])
    pattern = _one_of(point, "pattern", None, PATTERNS)
    if pattern == "2:4" and ratio != 0.5:
        raise SettingsError(f"prune point {point}: the pattern 2:4 removes half of the weights; set 'ratio' to 0.5")
    odd = [name for name in ("hidden_size", "intermediate_size") if getattr(config, name) % 4]
    if pattern == "2:4" and odd:
        raise SettingsError(f"prune point {point}: the pattern 2:4 needs a {odd[0]} that is a multiple of 4")
    settings = {"method": "unstructured", "ratio": ratio, "importance": importance, "pattern": pattern}
    return Plan("unstructured", settings, {}, {})


def _one_of(point, key, default, valid):
    value = point.get(key, default)
    if value not in valid:
        raise SettingsError(
            f"prune point {point}: '{key}' is {value!r}, but must be one of {list(valid)}"
            f"{nearest(value, [name for name in valid if name])}"
        )
    return value


def _check_removes(point, remove, config):
    if not any(remove.values()):
        raise SettingsError(
            f"prune point {point}: nothing would be removed ({_sizes(config)}), so the candidate would be the dense "
            "model; raise 'ratio' or add to 'parts'"
        )


def _sizes(config) -> str:
    return f"{config.intermediate_size} channels and {config.num_key_value_heads} KV groups a layer"


def alignment(width: int) -> int:
    """The number that kept widths out of `width` are multiples of."""
    return ALIGN_TO if width >= ALIGN_FROM else 1


def _kept_channels(ratio: float, width: int) -> int:
    align = alignment(width)
    return max(align, round(max(1, width - round(ratio * width)) / align) * align)


def _removed_groups(point, ratio: float, config) -> int:
    groups = config.num_key_value_heads
    count = math.floor(ratio * groups + 1e-9)  # 0.3 * 10 is 2.9999999999999996
    if count >= groups:  # a ratio within 1e-9 of 1
        raise SettingsError(f"prune point {point}: removing {count} of {groups} KV groups would leave none")
    if count and not _loads(config, groups - count):
        able = [n for n in range(1, groups) if _loads(config, groups - n)]
        works = " or ".join(f"{n / groups:.4g}" for n in able) or "no ratio"
        raise SettingsError(
            f"prune point {point}: with {groups - count} of {groups} KV groups the model would not load in plain "
            f"transformers ({type(config).__name__} wants hidden_size {config.hidden_size} to be a multiple of the "
            f"number of attention heads); {works} works for 'attention', or leave it out of 'parts'"
        )
    return count


def _head_counts(config, groups: int) -> dict[str, int]:
    per_group = config.num_attention_heads // config.num_key_value_heads
    # head_dim becomes explicit: its default, hidden_size / num_attention_heads, is wrong once heads are gone.
    return {
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def _loads(config, groups: int) -> bool:
    """Whether the configuration's own checks, which run in every `from_pretrained`, accept so many KV groups."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict({**config.to_dict(), **_head_counts(config, groups)})
    except (StrictDataclassError, ValueError):
        return False
    return True
