"""Check a grid point against a model's configuration, without reading weights or importing torch.

This lets the workflow reject a point that a model cannot take before any job starts.
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
# MLPs at least this wide keep a width that is a multiple of 8, because GPU matrix units are slower on other widths.
ALIGN_FROM, ALIGN_TO = 1024, 8


@dataclass(frozen=True)
class Plan:
    """What a grid point means for one model.

    settings: the point with its defaults filled in.
    remove: number of structures to remove: `{"layers": n}` for depth, `{"mlp": channels, "attention": KV groups}` for
        width (per layer, or over all layers if the ranking is global), `{}` for unstructured.
    changes: new values for the model's configuration.
    """

    method: str
    settings: dict[str, Any]
    remove: dict[str, int]
    changes: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def needs_batches(self) -> bool:
        """True if importance is measured on calibration data, as it always is for depth (which has no such key)."""
        return self.settings.get("importance") != "magnitude"


def resolve(point: dict[str, Any], config) -> Plan:
    """Return the plan of one grid point for a model with this configuration.

    Depth removes round(ratio * layers) blocks, at least 1. Width removes round(ratio * intermediate_size) channels and
    floor(ratio * num_key_value_heads) KV groups with their query heads, the same number in every layer; from a width of
    1024 on, the kept width is rounded to a multiple of 8. With `ranking: global`, width removes the same shares of all
    layers' structures together, so that the layers differ (an odd-shaped checkpoint).

    Args:
        point: one of these; its `name` is ignored.
            `{"method": "depth", "ratio": 0.25, "consecutive": false}`
            `{"method": "width", "ratio": 0.5, "importance": "taylor" | "activation" | "magnitude",
            "parts": ["mlp", "attention"], "ranking": "uniform" | "global"}`, default: taylor, mlp only, uniform
            `{"method": "unstructured", "ratio": 0.5, "importance": "wanda" | "magnitude", "pattern": null | "2:4"}`,
            default: wanda without a pattern
        config: the model's transformers configuration.

    Raises:
        SettingsError: names the key, its value and what would work.
        CheckpointError: the architecture is not one of `FAMILIES`.
    """
    method = point.get("method")
    if method not in KEYS:
        raise SettingsError(
            f"prune point {point}: 'method' is {method!r}, but must be one of {sorted(KEYS)}{nearest(method, KEYS)}"
        )
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
            f"{config.name_or_path or type(config).__name__}: model type '{config.model_type}' is not supported for "
            f"pruning (supported: {', '.join(FAMILIES)}). Prune it with another tool and list the result in "
            "candidates.table."
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
            f"prune point {point}: removing {count} of {layers} layers would leave none. Lower 'ratio' so that at "
            "least one layer stays."
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
    if ranking == "global":
        # The layers then differ in width, so the configuration keeps the dense model's numbers.
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
        raise SettingsError(
            f"prune point {point}: 'ratio' is {ratio}, but pattern 2:4 always removes half of the weights. "
            "Set 'ratio' to 0.5."
        )
    odd = [name for name in ("hidden_size", "intermediate_size") if getattr(config, name) % 4]
    if pattern == "2:4" and odd:
        raise SettingsError(
            f"prune point {point}: pattern 2:4 needs a {odd[0]} that is a multiple of 4, but this model's is "
            f"{getattr(config, odd[0])}. Set 'pattern' to null."
        )
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
            f"prune point {point}: nothing would be removed (the model has {_sizes(config)}), so the candidate would "
            "be the dense model. Raise 'ratio' or add to 'parts'."
        )


def _sizes(config) -> str:
    return f"{config.intermediate_size} channels and {config.num_key_value_heads} KV groups a layer"


def alignment(width: int) -> int:
    """Return the multiple to which kept widths are rounded, for a dense MLP of this width."""
    return ALIGN_TO if width >= ALIGN_FROM else 1


def _kept_channels(ratio: float, width: int) -> int:
    align = alignment(width)
    return max(align, round(max(1, width - round(ratio * width)) / align) * align)


def _removed_groups(point, ratio: float, config) -> int:
    groups = config.num_key_value_heads
    # The tolerance corrects products that come out just below an integer.
    count = math.floor(ratio * groups + 1e-9)
    if count >= groups:  # happens if the ratio is within 1e-9 of 1
        raise SettingsError(
            f"prune point {point}: removing {count} of {groups} KV groups would leave none. Lower 'ratio'."
        )
    if count and not _loads(config, groups - count):
        loadable = [n for n in range(1, groups) if _loads(config, groups - n)]
        works = " or ".join(f"{n / groups:.4g}" for n in loadable) or "no ratio"
        raise SettingsError(
            f"prune point {point}: with {groups - count} of {groups} KV groups, the model would not load in plain "
            f"transformers ({type(config).__name__} requires hidden_size {config.hidden_size} to be a multiple of the "
            f"number of attention heads). For 'attention', {works} works; or leave it out of 'parts'."
        )
    return count


def _head_counts(config, groups: int) -> dict[str, int]:
    per_group = config.num_attention_heads // config.num_key_value_heads
    # Set head_dim explicitly: its default, hidden_size / num_attention_heads, is wrong once heads are removed.
    return {
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def _loads(config, groups: int) -> bool:
    """Return True if the configuration accepts this many KV groups; every `from_pretrained` runs the same checks."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict({**config.to_dict(), **_head_counts(config, groups)})
    except (StrictDataclassError, ValueError):
        return False
    return True
