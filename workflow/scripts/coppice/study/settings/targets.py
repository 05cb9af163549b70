"""Check target paths given on the command line for mistyped models, configs, candidates, ablations and arms.

Without this check Snakemake would only report that no rule makes the file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NoReturn

from coppice.core.errors import SettingsError, nearest

from .. import layout

if TYPE_CHECKING:
    from .study import Study

CONFIG_FOLDERS = (layout.root("selection"), layout.root("pruned"))
FINETUNED_FOLDERS = (layout.root("training"), layout.root("finetuned"))
CANDIDATE_FOLDERS = (layout.root("candidate"), layout.root("scores"), layout.BY_CANDIDATE)
FOLDERS = (*CONFIG_FOLDERS, *FINETUNED_FOLDERS, *CANDIDATE_FOLDERS, layout.root("dense"))
ABLATIONS = "ablation"


def check_targets(study: Study, targets: Iterable[str]) -> None:
    """Raise SettingsError if a target path under the results names something that is not in the study.

    That is a model, a config, a candidate, an ablation or an arm.
    """
    root = os.path.join(study.workdir, study.results)
    for target in targets:
        path = os.path.relpath(os.path.join(study.workdir, target), root)
        folder, *parts = path.split(os.sep)
        if folder == ABLATIONS and parts:
            _check_ablation(study, target, parts)
        if folder in FOLDERS and not _is_for_whole_stage(study, parts):
            _check(study, target, folder, parts)


def _is_for_whole_stage(study: Study, parts: list[str]) -> bool:
    """Return whether a file covers all models or all candidates of a model, such as SUMMARY.md, figures, grid.json."""
    of_stage = (len(parts) == 1 and "." in parts[0]) or parts[:1] == ["figures"]
    return (of_stage and parts[0] not in study.models) or parts[1:] in (["released.json"], ["grid.json"])


def _check(study: Study, target: str, folder: str, parts: list[str]) -> None:
    if not parts:
        return
    model = parts[0]
    if model not in study.models:
        _reject(target, "model", model, study.models)
    if len(parts) < 2:
        return
    if folder in CANDIDATE_FOLDERS and parts[1] not in study.candidates(model):
        _reject(target, f"candidate of {model}", parts[1], study.candidates(model))
    configs = study.criteria_of(model)
    if folder in CONFIG_FOLDERS and parts[1] not in configs:
        _reject(target, f"config of {model}", parts[1], configs)
    if folder in FINETUNED_FOLDERS:
        valid = [config + layout.TUNED for config in configs]
        if parts[1] not in valid:
            _reject(target, f"fine-tuned config of {model}", parts[1], valid)


def _check_ablation(study: Study, target: str, parts: list[str]) -> None:
    name, configured = parts[0], study.config.ablations
    if name not in configured:
        _reject(target, "ablation", name, configured)
    if name not in study.ablations:
        start = configured[name].start
        begin = " ".join(filter(None, (start.model, start.config)))
        raise SettingsError(
            f"target {target}: the ablation starts from {begin}, which is not in the study; the study has the models "
            f"{', '.join(study.models)} and the configs {', '.join(study.configs)}"
        )
    arms = study.ablations[name].arms
    if len(parts) > 2 and parts[1] != "figures" and parts[1] not in arms:
        _reject(target, f"arm of {name}", parts[1], arms)


def _reject(target: str, kind: str, name: str, valid: Collection[str]) -> NoReturn:
    listed = ", ".join(valid) or "none"
    raise SettingsError(
        f"target {target}: there is no {kind} '{name}' in the study; valid are {listed}{nearest(name, valid)}"
    )
