"""Check a grid point against a model's configuration, without reading weights or importing torch.

This lets the workflow reject a point that a model cannot take before any job starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from coppice.core.aliases import Json, Record
from coppice.core.errors import CheckpointError, SettingsError, nearest
from coppice.models import kinds
from coppice.models.towers import Anatomy

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEYS = {
    "depth": {"tower", "ratio", "importance", "consecutive", "keep_blocks", "steps"},
    "width": {"tower", "ratio", "importance", "parts", "ranking", "keep_blocks", "steps"},
    "unstructured": {"tower", "ratio", "importance", "pattern"},
}
IMPORTANCES = {
    "depth": ("block-influence", "perplexity", "taylor"),
    "width": ("taylor", "taylor-second", "taylor-mixed", "activation", "magnitude"),
    "unstructured": ("wanda", "wanda-one-shot", "sparsegpt", "magnitude"),
}
RANKINGS = ("uniform", "global")
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
        """True if importance is measured on calibration data."""
        return self.settings.get("importance") != "magnitude"


def towers_of(point: dict[str, Any], config: PretrainedConfig) -> list[Anatomy]:
    """Return the towers that a grid point prunes: the one that it names, else all or the first, as the kind says.

    Raises:
        SettingsError: The model has no tower of that name.
        CheckpointError: The architecture cannot be pruned.
    """
    kind, wanted = kinds.of(config), point.get("tower")
    towers = {tower.name: tower for tower in kind.anatomies(config)}
    if not towers:
        raise CheckpointError(f"{config.name_or_path or type(config).__name__}: {kind.cannot_prune(config.model_type)}")
    if wanted is not None:
        return [towers[_one_of(point, "tower", None, tuple(towers))]]
    return [*towers.values()] if kind.prunes_together else [*towers.values()][:1]


def resolve(point: dict[str, Any], config: PretrainedConfig, tower: Anatomy | None = None) -> Plan:
    """Return the plan of one grid point for a tower of a model with this configuration.

    Depth removes round(ratio * layers) blocks, at least 1, and none of those that the architecture fixes. Width removes
    round(ratio * intermediate_size) channels and
    floor(ratio * num_key_value_heads) KV groups with their query heads, the same number in every layer; from a width of
    1024 on, the kept width is rounded to a multiple of 8. With `ranking: global`, width removes the same shares of all
    layers' structures together, so that the layers differ (an odd-shaped checkpoint). The blocks of `keep_blocks` are
    not pruned; for width, the ratio is that of the other blocks. With `steps`, an equal share is removed at a time.

    Args:
        point: one of these; its `name` is ignored.
            `{"method": "depth", "ratio": 0.25, "importance": "block-influence" | "perplexity" | "taylor",
            "consecutive": false, "keep_blocks": {"first": 4, "last": 2}, "steps": 1}`
            `{"method": "width", "ratio": 0.5, "importance": "taylor" | "taylor-second" | "taylor-mixed" | "activation"
            | "magnitude", "parts": ["mlp", "attention"], "ranking": "uniform" | "global", "keep_blocks": ...,
            "steps": 1}`, default: taylor, mlp only, uniform
            `{"method": "unstructured", "ratio": 0.5, "importance": "wanda" | "wanda-one-shot" | "sparsegpt" |
            "magnitude", "pattern": null | "n:m"}`, default: wanda without a pattern
            Each may name a `tower` of the model.
        config: the model's transformers configuration.
        tower: one of those that the point prunes (`towers_of`), by default the first.

    Raises:
        SettingsError: names the key, its value and what would work.
        CheckpointError: the architecture cannot be pruned.
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
    tower = tower or towers_of(point, config)[0]
    plan = {"depth": _depth, "width": _width, "unstructured": _unstructured}[method](point, ratio, tower)
    named = {"tower": tower.name} if point.get("tower") is not None else {}
    return replace(plan, settings=named | plan.settings)


def _depth(point: Record, ratio: float, tower: Anatomy) -> Plan:
    consecutive = point.get("consecutive", False)
    if not isinstance(consecutive, bool):
        raise SettingsError(f"prune point {point}: 'consecutive' is {consecutive!r}, but must be true or false")
    importance = _one_of(point, "importance", "block-influence", IMPORTANCES["depth"])
    keep, steps = _kept_blocks(point, tower), _steps(point)
    keep["first"] = max(keep["first"], tower.fixed)
    if consecutive and (importance != "block-influence" or steps > 1):
        raise SettingsError(
            f"prune point {point}: 'consecutive' takes no other importance and no 'steps', because the whole run is "
            "chosen at once by its angular distance. Remove one of them."
        )
    layers = tower.blocks
    count, free = max(1, round(ratio * layers)), layers - keep["first"] - keep["last"]
    if count >= layers or count > free:
        raise SettingsError(
            f"prune point {point}: removing {count} of {layers} layers would leave none"
            f"{f' but those of keep_blocks, and {free} are free' if free < layers else ''}. Lower 'ratio' so that at "
            "least one layer stays."
        )
    settings = {"method": "depth", "ratio": ratio, "importance": importance, "consecutive": consecutive}
    settings |= {"keep_blocks": keep, "steps": steps}
    return Plan("depth", settings, {"layers": count}, {tower.blocks_key: layers - count})


def _kept_blocks(point: Record, tower: Anatomy) -> dict[str, int]:
    """Return {first, last}: how many blocks at the beginning and at the end are not pruned."""
    given = point.get("keep_blocks", {})
    if not isinstance(given, dict) or not {*given} <= {"first", "last"}:
        raise SettingsError(f"prune point {point}: 'keep_blocks' must be a mapping such as {{first: 4, last: 2}}")
    keep = {"first": 0, "last": 0} | given
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in keep.values()):
        raise SettingsError(f"prune point {point}: 'keep_blocks' must hold whole numbers of at least 0")
    if sum(keep.values()) >= tower.blocks:
        raise SettingsError(
            f"prune point {point}: 'keep_blocks' keeps all {tower.blocks} layers of this model. Lower its numbers."
        )
    return keep


def _steps(point: Record) -> int:
    steps = point.get("steps", 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SettingsError(f"prune point {point}: 'steps' is {steps!r}, but must be a whole number of at least 1")
    return steps


def _width(point: Record, ratio: float, tower: Anatomy) -> Plan:
    importance, parts = _one_of(point, "importance", "taylor", IMPORTANCES["width"]), point.get("parts", ["mlp"])
    ranking = _one_of(point, "ranking", "uniform", RANKINGS)
    if not isinstance(parts, list | tuple) or not parts or not set(parts) <= set(PARTS):
        raise SettingsError(f"prune point {point}: 'parts' is {parts!r}, but must list some of {list(PARTS)}")
    parts = [part for part in PARTS if part in parts]
    keep = _kept_blocks(point, tower)
    _check_parts(point, parts, ranking == "global" or any(keep.values()), tower)
    settings = {"method": "width", "ratio": ratio, "importance": importance, "parts": parts, "ranking": ranking}
    settings |= {"keep_blocks": keep, "steps": _steps(point)}
    if "attention" in parts and "cross-attention" in tower.parts:
        parts.append("cross-attention")  # one key of the configuration holds the number of heads of both
    if ranking == "global" or any(keep.values()):
        # The layers then differ in width, so the configuration keeps the dense model's numbers.
        sizes = {part: tower.parts[part].count(tower.config) for part in parts}
        if ranking == "global":
            free = tower.blocks - sum(keep.values())
            remove = {part: math.floor(ratio * size * free + 1e-9) for part, size in sizes.items()}
        else:
            remove = {part: math.floor(ratio * size + 1e-9) for part, size in sizes.items()}
            if "mlp" in parts:
                remove["mlp"] = sizes["mlp"] - _kept_channels(ratio, sizes["mlp"])
        _check_removes(point, remove, tower)
        return Plan("width", settings, remove, {})
    remove, changes, warnings = {}, {}, []
    if "mlp" in parts:
        channels = _size(tower, "mlp")
        kept = _kept_channels(ratio, channels)
        remove["mlp"] = channels - kept
        changes |= tower.parts["mlp"].changes(tower.config, kept)
    if "attention" in parts:
        remove["attention"] = _removed_groups(point, ratio, tower)
        changes |= _head_counts(tower, _size(tower, "attention") - remove["attention"])
    if "cross-attention" in parts:
        remove["cross-attention"] = remove["attention"]
    if not tower.own_sizes and point.get("tower") is not None:
        changes = {}  # the other towers keep the widths that the configuration states
    _check_removes(point, remove, tower)
    warnings += [f"ratio {ratio} removes nothing from '{p}' ({_sizes(tower)})" for p in parts if not remove[p]]
    return Plan("width", settings, remove, changes, warnings)


def _check_parts(point: Record, parts: Sequence[str], uneven: bool, tower: Anatomy) -> None:
    """Raise SettingsError if the tower lacks a part, or if its blocks must lose the same structures and would not."""
    for part in parts:
        if part not in tower.parts:
            raise SettingsError(
                f"prune point {point}: 'parts' names '{part}', but a {type(tower.config).__name__} cannot have fewer "
                f"of its structures, because it derives their width from their number. Set 'parts' to "
                f"{[name for name in PARTS if name in tower.parts]}."
            )
        if uneven and tower.parts[part].alike:
            raise SettingsError(
                f"prune point {point}: all layers of this model's {tower.name} must lose the same "
                f"{tower.parts[part].noun}, because they share a bias of positions. For '{part}', set 'ranking' to "
                "uniform and leave out 'keep_blocks'."
            )


def _unstructured(point: Record, ratio: float, tower: Anatomy) -> Plan:
    importance = _one_of(point, "importance", "wanda", IMPORTANCES["unstructured"])
    pattern = point.get("pattern")
    if pattern is not None:
        _check_pattern(point, pattern, ratio, tower)
    settings = {"method": "unstructured", "ratio": ratio, "importance": importance, "pattern": pattern}
    return Plan("unstructured", settings, {}, {})


def numbers_of(pattern: str) -> tuple[int, int]:
    """Return (n, m) of a pattern "n:m", which keeps n of every m weights."""
    kept, of = pattern.split(":")
    return int(kept), int(of)


def _check_pattern(point: Record, pattern: Json, ratio: float, tower: Anatomy) -> None:
    """Raise SettingsError unless the pattern is one, agrees with the ratio and fits the widths of all layers."""
    if not isinstance(pattern, str) or not re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", pattern):
        raise SettingsError(
            f"prune point {point}: 'pattern' is {pattern!r}, but must be null or 'n:m', such as '2:4' or '4:8'"
        )
    kept, of = numbers_of(pattern)
    if abs(1 - kept / of - ratio) > 1e-6:
        raise SettingsError(
            f"prune point {point}: 'ratio' is {ratio}, but pattern {pattern} keeps {kept} of every {of} weights. "
            f"Set 'ratio' to {1 - kept / of:.7g}."
        )
    config, mlp = tower.config, tower.parts["mlp"]
    widths = {"hidden_size": config.hidden_size} | mlp.changes(config, mlp.count(config))
    odd = [name for name, width in widths.items() if width % of]
    if odd:
        raise SettingsError(
            f"prune point {point}: pattern {pattern} needs a {odd[0]} that is a multiple of {of}, but this model's is "
            f"{widths[odd[0]]}. Set 'pattern' to null."
        )


def _one_of(point: Record, key: str, default: str | None, valid: Sequence[str | None]) -> Json:
    value = point.get(key, default)
    if value not in valid:
        raise SettingsError(
            f"prune point {point}: '{key}' is {value!r}, but must be one of {list(valid)}"
            f"{nearest(value, [name for name in valid if name])}"
        )
    return value


def _check_removes(point: Record, remove: Mapping[str, int], tower: Anatomy) -> None:
    if not any(remove.values()):
        raise SettingsError(
            f"prune point {point}: nothing would be removed (the model has {_sizes(tower)}), so the candidate would "
            "be the dense model. Raise 'ratio' or add to 'parts'."
        )


def _size(tower: Anatomy, part: str) -> int:
    return tower.parts[part].count(tower.config)


def _sizes(tower: Anatomy) -> str:
    return f"{' and '.join(f'{part.count(tower.config)} {part.noun}' for part in tower.parts.values())} a layer"


def alignment(width: int) -> int:
    """Return the multiple to which kept widths are rounded, for a dense MLP of this width."""
    return ALIGN_TO if width >= ALIGN_FROM else 1


def _kept_channels(ratio: float, width: int) -> int:
    align = alignment(width)
    return max(align, round(max(1, width - round(ratio * width)) / align) * align)


def _removed_groups(point: Record, ratio: float, tower: Anatomy) -> int:
    groups, config = _size(tower, "attention"), tower.config
    # The tolerance corrects products that come out just below an integer.
    count = math.floor(ratio * groups + 1e-9)
    if count >= groups:  # happens if the ratio is within 1e-9 of 1
        raise SettingsError(
            f"prune point {point}: removing {count} of {groups} {tower.parts['attention'].noun} would leave none. "
            "Lower 'ratio'."
        )
    if count and not _loads(tower, groups - count):
        loadable = [n for n in range(1, groups) if _loads(tower, groups - n)]
        works = " or ".join(f"{n / groups:.4g}" for n in loadable) or "no ratio"
        raise SettingsError(
            f"prune point {point}: with {groups - count} of {groups} KV groups, the model would not load in plain "
            f"transformers ({type(config).__name__} requires hidden_size {config.hidden_size} to be a multiple of the "
            f"number of attention heads). For 'attention', {works} works; or leave it out of 'parts'."
        )
    return count


def _head_counts(tower: Anatomy, groups: int) -> dict[str, Any]:
    return tower.parts["attention"].changes(tower.config, groups)


def _loads(tower: Anatomy, groups: int) -> bool:
    """Return True if the configuration accepts this many KV groups; every `from_pretrained` runs the same checks."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(tower.config).from_dict({**tower.config.to_dict(), **_head_counts(tower, groups)})
    except (StrictDataclassError, ValueError):
        return False
    return True
