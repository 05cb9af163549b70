"""Check the section `evaluate`: tasks and their metrics, the user's own task definitions, protocols, and classes."""

import os
from collections.abc import Mapping
from pathlib import Path

from coppice.core.errors import SettingsError, nearest

from .. import layout
from . import registry, task_metrics
from .sections.evaluate import Answers, Classification, Evaluate, Perplexity
from .sources import absolute, check_name, check_paths


def checked(evaluate: Evaluate, section: str, workdir: str, notices: list[str]) -> Evaluate:
    """Return a section with an absolute `include_path` and the names of classes in place of their file, all checked.

    Args:
        evaluate: the study's section, or that of a model.
        section: its key: `evaluate` or `models.X.evaluate`.
        workdir: the folder that relative paths resolve against.
        notices: a list to which notices are added.

    Raises:
        SettingsError: a task, a metric or a protocol does not exist, or classes cannot be classified by their names.
    """
    evaluate = _with_tasks(evaluate, section, workdir, notices)
    _check_protocols(evaluate.perplexity, f"config key {section}.perplexity")
    _check_programs(evaluate.answers, f"config key {section}.answers")
    found = _with_classes(evaluate.classification, f"config key {section}.classification", workdir)
    return evaluate if found is evaluate.classification else evaluate.model_copy(update={"classification": found})


def _with_classes(section: Classification, key: str, workdir: str) -> Classification:
    """Return the section `evaluate.classification` with the names in the file of classes, one a line."""
    for template in section.templates:
        if template.count("{}") != 1:
            raise SettingsError(f"{key}.templates: found '{template}'; write {{}} once, where the class's name goes")
    if not isinstance(section.classes, str):
        return section
    file = Path(absolute(section.classes, workdir))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{key}.classes: {section.classes} cannot be read as text ({error})") from error
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(names) < 2:
        raise SettingsError(
            f"{key}.classes: {section.classes} names {len(names)} classes; write at least two, one a line"
        )
    return section.model_copy(update={"classes": names})


def _with_tasks(evaluate: Evaluate, section: str, workdir: str, notices: list[str]) -> Evaluate:
    """Return the section `evaluate` with an absolute `include_path`, its tasks checked."""
    key, zero_shot = f"config key {section}.zero_shot", evaluate.zero_shot
    if zero_shot.include_path is not None:
        place = absolute(zero_shot.include_path, workdir)
        own = _included(zero_shot.include_path, place)
        zero_shot = zero_shot.model_copy(update={"include_path": place})
    else:
        own = registry.Tasks({}, frozenset())
    metrics = zero_shot.metric.model_dump()
    for task in zero_shot.tasks:
        check_name(task, f"{key}.tasks")
        if task in own.files or task in registry.TASKS or task in registry.harness_tasks().files:
            _check_metric(metrics.get(task), task, own.files, key)
            continue
        if task in own.groups | registry.harness_tasks().groups:
            raise SettingsError(f"{key}.tasks: '{task}' is a group of tasks; name the tasks themselves")
        if not registry.harness_tasks().files:
            notices.append(f"{key}.tasks: '{task}' was not checked because lm-eval is not installed here")
            continue
        close = nearest(task, [*own.files, *registry.TASKS]) or nearest(task, registry.harness_tasks().files)
        raise SettingsError(f"{key}.tasks: lm-eval has no task '{task}'{close}")
    valid = {*zero_shot.tasks, *registry.TASKS}
    for task in metrics:
        if task not in valid:
            raise SettingsError(
                f"{key}.metric.{task}: '{task}' is not among {section}.zero_shot.tasks{nearest(task, valid)}"
            )
    return evaluate.model_copy(update={"zero_shot": zero_shot})


def _check_programs(answers: Answers, key: str) -> None:
    """Raise SettingsError if several programs of a row would be the same one, or pass@k needs more of them."""
    programs = answers.programs
    if programs.samples > 1 and not answers.sample:
        raise SettingsError(f"{key}.programs.samples: found {programs.samples}, which needs answers.sample: true")
    if max(programs.k) > programs.samples:
        raise SettingsError(
            f"{key}.programs.k: pass@{max(programs.k)} needs at least {max(programs.k)} samples; raise programs.samples"
        )


def _check_metric(wanted: str | None, task: str, own: Mapping[str, Path], key: str) -> None:
    """Raise SettingsError if the task lacks its configured metric (or None), or the user's definition is broken."""
    if task in own:
        names = task_metrics.metrics(own[task], f"{key}.include_path")
    else:
        file = registry.definition_file(task) if wanted else None
        names = file and task_metrics.metrics(file, f"{key}.metric.{task}")
    if wanted and names and wanted not in names:
        listed = ", ".join(names)
        raise SettingsError(
            f"{key}.metric.{task}: the task has no metric '{wanted}' (it has {listed}){nearest(wanted, names)}"
        )


def _included(given: str, place: str) -> registry.Tasks:
    """Return the tasks in the folder `place`, which the user gave as `given`."""
    key = "config key evaluate.zero_shot.include_path"
    if not os.path.isdir(place):
        raise SettingsError(f"{key}: there is no folder {given} (looked at {place})")
    found = registry.tasks_in(place)
    if not found.files:
        raise SettingsError(f"{key}: no .yaml file in {given} defines a task")
    check_paths(layout.definition_files(place), key)
    return found


def _check_protocols(perplexity: Perplexity, key: str) -> None:
    own = perplexity.protocols
    for name, protocol in own.items():
        check_name(name, f"{key}.protocols")
        if name in registry.PROTOCOLS:
            raise SettingsError(f"{key}.protocols.{name}: Coppice has a protocol of this name; choose another name")
        if (protocol.stride or 1) > protocol.seq_len:
            raise SettingsError(
                f"{key}.protocols.{name}.stride: found {protocol.stride}, must be at most seq_len "
                f"({protocol.seq_len}); a larger stride would skip tokens between windows"
            )
    names, valid = perplexity.protocol, [*registry.PROTOCOLS, *own]
    for name in [names] if isinstance(names, str) else names:
        if name not in valid:
            raise SettingsError(f"{key}.protocol: found '{name}'; valid are {', '.join(valid)}{nearest(name, valid)}")
