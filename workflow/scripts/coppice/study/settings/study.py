"""Resolve the configuration into a `Study`: models, criteria, candidates, data sets and ablations that fit together."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from coppice.core.aliases import PathLike, Record
from coppice.core.errors import SettingsError, nearest
from coppice.models import kinds

from .. import layout
from . import ablations, arms, candidate_lists, checking, criteria, dataset_uses, lora_presets, registry, task_metrics
from . import config_files as strict
from .resolved import StudyAblation, StudyDataset, StudyModel
from .sections import Config, Only
from .sections.evaluate import Evaluate, Perplexity
from .sections.finetune import Finetune, Lora
from .sources import (
    absolute,
    check_held_out,
    check_name,
    check_paths,
    folder,
    resolve_model,
)


@dataclass(frozen=True)
class Study:
    """A resolved configuration, as `load` returns it. Every mapping keeps the order of the configuration.

    The sections, models, data sets and ablations are frozen models. Criteria (`configs`) and candidates are plain
    dictionaries: jobs get them as they are, and records hold them. `notices` are messages to the user about entries
    that are ignored.
    """

    config: Config
    models: dict[str, StudyModel]
    configs: dict[str, Record]
    datasets: dict[str, StudyDataset]
    workdir: str
    notices: list[str] = field(default_factory=list)
    _candidates: dict[str, dict[str, Record]] = field(default_factory=dict)
    ablations: dict[str, StudyAblation] = field(default_factory=dict)

    results = property(lambda self: self.config.results)
    resources = property(lambda self: self.config.resources)
    seed = property(lambda self: self.config.seed)
    finetune = property(lambda self: self.config.finetune)
    evaluate = property(lambda self: self.config.evaluate)
    select = property(lambda self: self.config.select)
    miniature = property(lambda self: self.config.miniature)
    calibration = property(lambda self: candidate_lists.calibration(self.config.candidates.calibration))
    resources_per_job = property(lambda self: self.config.resources_per_job)
    threads_per_job = property(lambda self: self.config.threads_per_job)

    def active_models(self) -> list[str]:
        """Return the names of the models to run: those of `only.models`, else all."""
        only = self.config.only.models
        return [name for name in self.models if only is None or name in only]

    def active_configs(self) -> list[str]:
        """Return the names of the criteria to run: those of `only.configs`, else all."""
        only = self.config.only.configs
        return [name for name in self.configs if only is None or name in only]

    def pairs(self) -> list[tuple[str, str]]:
        """Return (model, config) of every pair to run."""
        return [(model, config) for model in self.active_models() for config in self.active_configs()]

    def candidates(self, model: str) -> dict[str, Record]:
        """Return the model's candidates by name: grid points (with `method`) or table rows (with `path`)."""
        return self._candidates[model]

    def shares_candidate_jobs(self) -> bool:
        """Return whether one job handles all candidates of a model. Then all models must name them alike."""
        names = {tuple(self.candidates(model)) for model in self.active_models()}
        return self.config.candidates.per_job == "all" and len(names) == 1

    def ablated_by(self) -> set[str]:
        """Return the names of the texts and tasks whose selection rows rank the arms of some ablation."""
        chosen = [
            lists for one in self.ablations.values() for lists in arms.chosen_by(one.choose_by, one.evaluate).values()
        ]
        return {name for lists in chosen for names in lists.values() for name in names}

    def training_datasets(self, ablation: str | None = None) -> list[str]:
        """Return the names of the data sets that the study, or one of its ablations, trains and validates on."""
        finetune = self.finetune if ablation is None else self.ablations[ablation].finetune
        return list(dataset_uses.names_in(finetune.data))

    def needs_bos(self) -> bool:
        """Return True if a perplexity protocol of the study begins every window with BOS."""
        perplexity = self.evaluate.perplexity
        names = [perplexity.protocol] if isinstance(perplexity.protocol, str) else perplexity.protocol
        places = [
            (perplexity.protocols[name].bos if name in perplexity.protocols else None)
            or perplexity.bos
            or ("every-window" if name in registry.PROTOCOLS_WITH_BOS else None)
            for name in names
        ]
        return bool(perplexity.datasets) and "every-window" in places

    def training_seeds(self) -> list[int]:
        """Return the seeds that every training is repeated with. The first seed's files are at the usual paths."""
        return self.finetune.seeds or [self.seed]

    def more_seeds(self) -> list[int]:
        """Return the seeds after the first."""
        return self.training_seeds()[1:]

    @staticmethod
    def seed_folder(seed: int) -> str:
        """Return the suffix that the paths of a training with this additional seed have."""
        return f"/seed-{seed}"

    def seed_folders(self) -> str:
        """Return a regular expression that matches every such suffix and the empty string."""
        return "(?:{})?".format("|".join(map(self.seed_folder, self.more_seeds())) or "/seed-none")

    def seed_in(self, folder: str) -> int:
        """Return the seed of a `seed_folder` suffix; an empty suffix means the first seed."""
        return int(folder.rpartition("-")[2]) if folder else self.training_seeds()[0]

    def defines(self, task: str) -> bool:
        """Return whether the user's own folder defines the task."""
        place = self.evaluate.zero_shot.include_path
        return place is not None and task in registry.tasks_in(place).files

    def dataset(self, name: str) -> StudyDataset | None:
        """Return the resolved entry of a data set; None for a task without one, which uses its official data."""
        return self.datasets.get(name)


def load(raw_config: Record, configfiles: Iterable[PathLike] = (), workdir: PathLike | None = None) -> Study:
    """Check and complete a configuration and return its `Study`.

    Args:
        raw_config: the merged configuration.
        configfiles: files to read again, because merging hides keys that are given twice.
        workdir: folder that relative paths resolve against; default: the current folder.

    Raises:
        SettingsError: one message that names the key, what was found and what is valid.
    """
    for file in configfiles:
        strict.check(file)
    workdir, notices = os.path.abspath(workdir or Path.cwd()), []
    config = checking.checked(Config, raw_config)
    completed = {name: dataset_uses.completed(name, entry) for name, entry in config.datasets.items()}
    folders = {key: folder(getattr(config, key), key, workdir) for key in ("results", "resources")}
    config = config.model_copy(update={"datasets": completed} | folders)
    _check_names(config)
    config = config.model_copy(update={"only": _restricted(config, raw_config, notices)})
    _check_training(config.finetune)
    lora = Lora.model_validate(lora_presets.resolve(config.finetune.lora.model_dump()))
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"lora": lora})})
    models = {name: resolve_model(name, entry, workdir, notices) for name, entry in config.models.items()}
    config = config.model_copy(update={"evaluate": _with_tasks(config.evaluate, workdir, notices)})
    _check_protocols(config.evaluate.perplexity)
    datasets = dataset_uses.resolve(config, workdir, notices)
    candidates, rows, columns = _candidates(config, workdir, notices)
    configs = criteria.resolve(config, rows, columns)
    ablated = ablations.resolve(config, workdir, notices)
    study = Study(config, models, configs, datasets, workdir, notices, candidates, ablated)
    _check_candidates(study)
    _notice_split(study)
    return study


def _check_names(config: Config) -> None:
    for section, entries in (
        ("models", config.models),
        ("select.configs", config.select.configs),
        ("datasets", config.datasets),
    ):
        for name in entries:
            check_name(name, f"config key {section}")
    if not config.models:
        raise SettingsError("the study has no model; add one under config key models")
    if not config.select.configs:
        raise SettingsError("the study has no config; add one under config key select.configs")


def _restricted(config: Config, raw: Record, notices: list[str]) -> Only:
    """Return `only` with names in the study. Dropped names get a notice, unknown names raise SettingsError."""
    kept = {}
    raw_configs = (raw.get("select") or {}).get("configs") or {}
    for key, entries, given in (
        ("models", config.models, raw.get("models") or {}),
        ("configs", config.select.configs, raw_configs),
    ):
        names = getattr(config.only, key)
        if names is None:
            continue
        for name in names:
            if name not in entries and name not in given:
                raise SettingsError(
                    f"config key only.{key}: '{name}' is not in the study; valid are {', '.join(entries)}"
                    f"{nearest(name, entries)}"
                )
            if name not in entries:
                notices.append(f"config key only.{key}: '{name}' was dropped from the study and is ignored")
        kept[key] = [name for name in names if name in entries]
        if not kept[key]:
            raise SettingsError(f"config key only.{key}: selects none of the study's {key}: {', '.join(entries)}")
    return config.only.model_copy(update=kept)


def _check_training(finetune: Finetune) -> None:
    size = finetune.data.val_size
    if size >= 1 and size != int(size):
        raise SettingsError(
            f"config key finetune.data.val_size: found {size}; give a whole number of rows, or a share below 1"
        )
    check_held_out(finetune.data, "config key finetune.data")
    if finetune.early_stopping and not (size or finetune.data.validation):
        raise SettingsError(
            "config key finetune.early_stopping: needs a validation loss; set finetune.data.val_size or .validation"
        )


def _with_tasks(evaluate: Evaluate, workdir: str, notices: list[str]) -> Evaluate:
    """Return the section `evaluate` with an absolute `include_path`, its tasks checked."""
    key, zero_shot = "config key evaluate.zero_shot.tasks", evaluate.zero_shot
    if zero_shot.include_path is not None:
        place = absolute(zero_shot.include_path, workdir)
        own = _included(zero_shot.include_path, place)
        zero_shot = zero_shot.model_copy(update={"include_path": place})
    else:
        own = registry.Tasks({}, frozenset())
    metrics = zero_shot.metric.model_dump()
    for task in zero_shot.tasks:
        check_name(task, key)
        if task in own.files or task in registry.TASKS or task in registry.harness_tasks().files:
            _check_metric(metrics.get(task), task, own.files)
            continue
        if task in own.groups | registry.harness_tasks().groups:
            raise SettingsError(f"{key}: '{task}' is a group of tasks; name the tasks themselves")
        if not registry.harness_tasks().files:
            notices.append(f"{key}: '{task}' was not checked because lm-eval is not installed here")
            continue
        close = nearest(task, [*own.files, *registry.TASKS]) or nearest(task, registry.harness_tasks().files)
        raise SettingsError(f"{key}: lm-eval has no task '{task}'{close}")
    valid = {*zero_shot.tasks, *registry.TASKS}
    for task in metrics:
        if task not in valid:
            raise SettingsError(
                f"config key evaluate.zero_shot.metric.{task}: '{task}' is not among evaluate.zero_shot.tasks"
                f"{nearest(task, valid)}"
            )
    return evaluate.model_copy(update={"zero_shot": zero_shot})


def _check_metric(wanted: str | None, task: str, own: Mapping[str, Path]) -> None:
    """Raise SettingsError if the task lacks its configured metric (or None), or the user's definition is broken."""
    if task in own:
        names = task_metrics.metrics(own[task], "config key evaluate.zero_shot.include_path")
    else:
        file = registry.definition_file(task) if wanted else None
        names = file and task_metrics.metrics(file, f"config key evaluate.zero_shot.metric.{task}")
    if wanted and names and wanted not in names:
        raise SettingsError(
            f"config key evaluate.zero_shot.metric.{task}: the task has no metric '{wanted}' (it has "
            f"{', '.join(names)}){nearest(wanted, names)}"
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


def _check_protocols(perplexity: Perplexity) -> None:
    own, key = perplexity.protocols, "config key evaluate.perplexity"
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


def _candidates(
    config: Config, workdir: str, notices: list[str]
) -> tuple[dict[str, dict[str, Record]], list[Record], list[str]]:
    """Return (candidates by model, rows, columns); rows and columns are those of the table, empty without one."""
    settings, models = config.candidates, config.models
    if settings.table is None:
        grids = {}
        for name, model in models.items():
            own = model.prune is not None
            key = f"models.{name}.prune" if own else "candidates.prune"
            grids[name] = candidate_lists.grid(model.prune if own else settings.prune, key)
        return grids, [], []
    columns, rows = candidate_lists.table(settings.table, workdir, criteria.measured(config.evaluate))
    columns = [column for column in columns if column not in candidate_lists.REQUIRED]
    for name in dict.fromkeys(row["model"] for row in rows if row["model"] not in models):
        notices.append(
            f"{settings.table}: model '{name}' is not in the study; its rows are ignored{nearest(name, models)}"
        )
    rows = [row for row in rows if row["model"] in models]
    by_model = {name: {} for name in models}
    for row in rows:
        # The line number is not part of a candidate: a row inserted above it must not rerun the candidate's jobs
        by_model[row["model"]][row["candidate"]] = {key: value for key, value in row.items() if key != "row"}
    return by_model, rows, columns


def _check_candidates(study: Study) -> None:
    settings = study.config.candidates
    if settings.per_job == "all" and not study.shares_candidate_jobs():
        study.notices.append(
            "config key candidates.per_job: 'all' needs candidates of the same names for every model, and these "
            "differ; each candidate gets a job of its own, as with 'one'"
        )
    for name in study.active_models():
        if study.candidates(name):
            if settings.table is None:
                _check_prunable(name, study.models[name])
            continue
        if settings.table is None:
            key = "candidates.prune" if study.config.models[name].prune is None else f"models.{name}.prune"
            raise SettingsError(f"config key {key}: is empty, so model '{name}' has no candidate; add a grid point")
        raise SettingsError(
            f"{settings.table}: has no row for model '{name}'; add one, or exclude the model with only.models"
        )


def _check_prunable(name: str, model: StudyModel) -> None:
    """Reject a grid for a local model whose architecture cannot be pruned here; others are checked when fetched."""
    if model.model_type is None:
        return
    kind = kinds.of(SimpleNamespace(model_type=model.model_type))
    if model.model_type not in kind.prunable:
        raise SettingsError(f"config key models.{name}.base: {kind.cannot_prune(model.model_type)}")


def _notice_split(study: Study) -> None:
    if study.select.split == "report":
        study.notices.append(
            "config key select.split: candidates are chosen on the rows that the reports use, so the reports are too "
            "favorable to the chosen candidates"
        )
