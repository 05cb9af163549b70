"""Find the linear layers that an adapter's settings name, and names by which peft finds exactly these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from coppice.core.errors import SettingsError
from coppice.models.kinds import ModelKind

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def linear_layers(model: nn.Module) -> list[str]:
    """Return the dotted names of the linear layers of `model`, without the output layer.

    Those of GPT-2 are `Conv1D`, which stores its weight transposed.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]


def target_modules(model: PreTrainedModel, kind: ModelKind, wanted: str | Sequence[str]) -> str | list[str]:
    """Return `target_modules` as peft takes them: "all-linear", or module names that exist in `model`.

    wanted: "all-linear", a group that the kind of the model names (`attention`, `mlp`), a module name, or a list of
        groups and names.
    """
    every = linear_layers(model)
    able = kind.adaptable(model, every)
    if wanted == "all-linear":
        return wanted if able == every else able
    found: dict[str, None] = {}
    for name in [wanted] if isinstance(wanted, str) else wanted:
        chosen = named(able, name, kind)
        if not chosen:
            raise no_match("finetune.lora.target_modules", name, f"a {type(model).__name__}", able)
        found |= dict.fromkeys(short_names(chosen, every, name))
    return list(found)


def named(layers: Sequence[str], name: str, kind: ModelKind) -> list[str]:
    """Return the layers that are meant by "all-linear", a group of the kind, or a module name."""
    words = kind.adapter_groups.get(name)
    if name == "all-linear":
        return list(layers)
    return [layer for layer in layers if (_lies_in(layer, words) if words else matches(layer, name))]


def no_match(key: str, name: str, where: str, layers: Sequence[str]) -> SettingsError:
    """Return the error that a name means none of the `layers`."""
    available = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
    return SettingsError(
        f"{key}: '{name}' matches no linear layer of {where} that an adapter can take. Set it to all-linear, or choose "
        f"from {', '.join(available)}."
    )


def _lies_in(layer: str, words: Sequence[str]) -> bool:
    """Return whether a layer lies in a group. The layer that chooses among experts is no part of an MLP."""
    *_, last = path = layer.split(".")
    return any(word in part for part in path for word in words) and not last.endswith(("gate", "router"))


def short_names(chosen: Sequence[str], every: Iterable[str], wanted: str = "") -> list[str]:
    """Return names by which peft finds exactly the `chosen` of all modules: `wanted` itself, or the shortest ones."""
    inside, found = set(chosen), []
    for layer in chosen:
        parts = layer.split(".")
        names = [wanted, parts[-1], ".".join(parts[-2:]), layer]
        found.append(next(n for n in names if matches(layer, n) and all(o in inside for o in every if matches(o, n))))
    return found


def matches(layer: str, name: str) -> bool:
    """Return whether the dotted name `layer` is `name` or ends with it, as peft matches names."""
    return layer == name or layer.endswith(f".{name}")
