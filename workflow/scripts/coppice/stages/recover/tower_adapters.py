"""Resolve what is trained in each tower of a model: an adapter of its own, all weights, or nothing.

All towers share one adapter, so that merging, loading and fingerprints work as for any other. Ranks that differ are
peft's rank and alpha patterns, and weights that are trained whole are its `modules_to_save`: plain
`PeftModel.from_pretrained` reads both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coppice.core.errors import CoppiceError, SettingsError
from coppice.models.kinds import ModelKind
from coppice.study.settings.sections.finetune import Lora as Adapter
from coppice.study.settings.sections.finetune import TowerLora

from . import target_names

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from coppice.models.kinds import LoadedModel

FROZEN, FULL = "frozen", "full"
BASE = "base_model.model."  # of every name in a peft model


@dataclass(frozen=True)
class Plan:
    """What an adapter trains.

    Attributes:
        targets: layers with an adapter, as peft takes them: "all-linear", or names that match no other module.
        ranks: dotted name of a layer -> its rank, of all layers of towers with settings of their own.
        alphas: the same for alpha.
        patterns: regular expression -> a layer that it matches, for each tower with settings of its own.
        whole: dotted names of modules whose weights are trained.
    """

    targets: str | list[str]
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    whole: Sequence[str] = ()

    def options(self) -> dict[str, object]:
        """Return the arguments of peft's LoraConfig."""
        ranks = {pattern: self.ranks[layer] for pattern, layer in self.patterns.items()}
        alphas = {pattern: self.alphas[layer] for pattern, layer in self.patterns.items()}
        found = {"rank_pattern": ranks, "alpha_pattern": alphas} if self.patterns else {}
        return {"target_modules": self.targets} | found | ({"modules_to_save": list(self.whole)} if self.whole else {})

    def check(self, model: PeftModel) -> None:
        """Raise CoppiceError if a layer has another rank or scale than planned: peft ignores patterns that fit none."""
        modules = dict(model.get_base_model().named_modules())
        for layer, rank in self.ranks.items():
            found = modules[layer]
            if found.r["default"] != rank or found.lora_alpha["default"] != self.alphas[layer]:
                raise CoppiceError(
                    f"finetune.lora.towers: layer {layer} got rank {found.r['default']} and alpha "
                    f"{found.lora_alpha['default']} from peft instead of {rank} and {self.alphas[layer]}. Report this "
                    "with the model's name, and remove the tower's own rank and alpha meanwhile."
                )


def trained_whole(settings: Adapter) -> bool:
    """Return whether all weights of a tower are trained."""
    return FULL in settings.towers.values()


def by_tower(kind: ModelKind, settings: Adapter) -> dict[str, str | TowerLora]:
    """Return what is trained in each tower of a kind: `FROZEN`, `FULL`, or an adapter."""
    usual = {name: FROZEN if name in kind.frozen_towers else TowerLora() for name in kind.tower_names}
    unknown = next((name for name in settings.towers if name not in usual), None)
    if unknown:
        raise SettingsError(
            f"finetune.lora.towers.{unknown}: {kind.noun} has no such tower. Name one of {', '.join(usual)}."
        )
    return usual | dict(settings.towers)


def plan(model: PreTrainedModel, kind: ModelKind, settings: Adapter) -> Plan:
    """Return what an adapter trains; settings: the section `finetune.lora`, with its preset resolved.

    Raises:
        SettingsError: A name matches no layer of the towers that it is meant for, or nothing would be trained.
    """
    if not settings.towers and not kind.frozen_towers:
        return Plan(target_names.target_modules(model, kind, settings.target_modules))
    able = kind.adaptable(model, target_names.linear_layers(model))
    layers: dict[str, list[str]] = {}  # tower -> its layers with an adapter
    whole: list[str] = []
    for tower, entry in by_tower(kind, settings).items():
        if entry == FULL:
            whole += _whole(model, kind, tower)
        elif isinstance(entry, TowerLora):
            layers[tower] = _layers([layer for layer in able if kind.tower_of(layer) == tower], tower, kind, settings)
    _check_shared_names(layers, able, kind, settings)
    every = [layer for own in layers.values() for layer in own]
    if not every and not whole:
        raise SettingsError("finetune.lora.towers: all towers are frozen. Give one an adapter, or set it to full.")
    ranks, alphas, patterns = {}, {}, {}
    for tower, own in layers.items():
        entry = settings.towers.get(tower, TowerLora())
        if entry.r is None and entry.alpha is None:
            continue
        ranks |= dict.fromkeys(own, settings.r if entry.r is None else entry.r)
        alphas |= dict.fromkeys(own, settings.alpha if entry.alpha is None else entry.alpha)
        others = [layer for layer in every if kind.tower_of(layer) != tower]
        patterns |= {rf"^{re.escape(prefix)}(\..*)?": own[0] for prefix in _prefixes(own, others)}
    return Plan(_targets(model, every), ranks, alphas, patterns, whole)


def _layers(own: Sequence[str], tower: str, kind: ModelKind, settings: Adapter) -> list[str]:
    """Return the layers of a tower that get an adapter; own: those of the tower that can take one."""
    entry = settings.towers.get(tower, TowerLora())
    wanted = entry.target_modules or settings.target_modules
    found: dict[str, None] = {}
    for name in [wanted] if isinstance(wanted, str) else wanted:
        chosen = target_names.named(own, name, kind)
        if not chosen and entry.target_modules:
            key = f"finetune.lora.towers.{tower}.target_modules"
            raise target_names.no_match(key, name, f"the tower '{tower}'", own)
        found |= dict.fromkeys(chosen)
    if not found and tower in settings.towers:
        raise SettingsError(
            f"finetune.lora.towers.{tower}: finetune.lora.target_modules ({wanted}) matches no linear layer of this "
            f"tower. Set finetune.lora.towers.{tower}.target_modules, or freeze the tower."
        )
    return list(found)


def _check_shared_names(
    layers: Mapping[str, Sequence[str]], able: Sequence[str], kind: ModelKind, settings: Adapter
) -> None:
    """Raise SettingsError if a name that all towers share matches a layer of none that has an adapter."""
    using = [tower for tower in layers if not settings.towers.get(tower, TowerLora()).target_modules]
    found = [layer for tower in using for layer in layers[tower]]
    wanted = settings.target_modules
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if using and not target_names.named(found, name, kind):
            where = " and ".join(f"the tower '{tower}'" for tower in using)
            own = [layer for layer in able if kind.tower_of(layer) in using]
            raise target_names.no_match("finetune.lora.target_modules", name, where, own)


def _targets(model: nn.Module, layers: Sequence[str]) -> str | list[str]:
    """Return names by which peft finds exactly these layers."""
    if not layers:
        from peft.utils.constants import DUMMY_TARGET_MODULES

        return DUMMY_TARGET_MODULES  # no adapter at all, beside the modules that are trained whole
    every = [name for name, _ in model.named_modules() if name]
    return list(dict.fromkeys(target_names.short_names(layers, every)))


def _prefixes(layers: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the shortest dotted beginnings of `layers` with which no other layer begins."""
    found: dict[str, None] = {}
    for layer in layers:
        parts = layer.split(".")
        beginnings = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        found[next(one for one in beginnings if not any(f"{other}.".startswith(f"{one}.") for other in others))] = None
    return list(found)


def _whole(model: nn.Module, kind: ModelKind, tower: str) -> list[str]:
    """Return the largest modules that hold weights of a tower and no others.

    A weight that is tied to one outside, such as embeddings that encoder and decoder share, stays frozen: a copy of it
    would no longer be tied.
    """
    from torch import nn

    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    foreign = {one for own in names.values() if any(kind.tower_of(name) != tower for name in own) for one in own}
    shared = {one for own in names.values() if len(own) > 1 for one in own}
    found: list[str] = []

    def descend(name: str, module: nn.Module) -> None:
        held = [f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters()]
        if not held or all(one in foreign for one in held):
            return
        containers = (nn.ModuleList, nn.ModuleDict)  # they have no forward pass, so peft cannot wrap them
        if name and not isinstance(module, containers) and not any(one in foreign | shared for one in held):
            found.append(name)
            return
        for child, part in module.named_children():
            descend(f"{name}.{child}".lstrip("."), part)

    descend("", model)
    if not found:
        raise SettingsError(
            f"finetune.lora.towers.{tower}: is full, but this {type(model).__name__} has no weights of its own there. "
            "Set it to frozen."
        )
    return found


def rates(model: PeftModel, kind: ModelKind, settings: Adapter) -> dict[float, list[nn.Parameter]]:
    """Return learning rate -> the trained parameters of the towers that have it as their own."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        entry = settings.towers.get(kind.tower_of(name.removeprefix(BASE)))
        if parameter.requires_grad and isinstance(entry, TowerLora) and entry.learning_rate is not None:
            found.setdefault(entry.learning_rate, []).append(parameter)
    return found


def trainable(model: LoadedModel, kind: ModelKind) -> dict[str, int]:
    """Return tower -> its number of trained parameters, for the towers that have any."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = kind.tower_of(name.removeprefix(BASE))
            found[tower] = found.get(tower, 0) + parameter.numel()
    return found
