"""Resolve the configuration into a `Study`: models, criteria, candidates, data sets and ablations that fit together."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coppice.core.aliases import PathLike, Record
from coppice.core.errors import SettingsError, nearest
from coppice.models import kinds

from . import ablations, arms, candidate_lists, checking, criteria, dataset_uses, own_sections, registry
from . import config_files as strict
from .own_sections import Sections
from .resolved import StudyAblation, StudyDataset, StudyModel
from .sections import Config, Only
from .sections.candidates import Calibration
from .sections.evaluate import Evaluate
from .sections.finetune import Finetune
from .sources import check_name, folder, resolve_model


@dataclass(frozen=True)
class Study:
    """A resolved configuration, as `load` returns it. Every mapping keeps the order of the configuration.

    The sections, models, data sets and ablations are frozen models. Criteria and candidates are plain dictionaries:
    jobs get them as they are, and records hold them. `finetune` and `evaluate` are the study's own sections;
    `finetune_of` and `evaluate_of` return those of a model. `notices` are messages to the user about entries that are
    ignored.
    """

    config: Config
    models: dict[str, StudyModel]
    datasets: dict[str, StudyDataset]
    workdir: str
    sections: Sections
    notices: list[str] = field(default_factory=list)
    _criteria: dict[str, dict[str, Record]] = field(default_factory=dict)
    _candidates: dict[str, dict[str, Record]] = field(default_factory=dict)
    ablations: dict[str, StudyAblation] = field(default_factory=dict)

    results = property(lambda self: self.config.results)
    resources = property(lambda self: self.config.resources)
    seed = property(lambda self: self.config.seed)
    finetune = property(lambda self: self.sections.finetune)
    evaluate = property(lambda self: self.sections.evaluate)
    select = property(lambda self: self.config.select)
    configs = property(lambda self: list(self.config.select.configs))
    miniature = property(lambda self: self.config.miniature)
    resources_per_job = property(lambda self: self.config.resources_per_job)
    threads_per_job = property(lambda self: self.config.threads_per_job)

    def kind_of(self, model: str) -> kinds.ModelKind:
        """Return the kind of a model."""
        return kinds.named(self.models[model].kind)

    def finetune_of(self, model: str) -> Finetune:
        """Return the section `finetune` of a model."""
        return self.sections.finetune_of[model]

    def teacher_of(self, model: str) -> str | None:
        """Return the name of the model that a model's candidates learn from; None if they learn from data alone."""
        objective = self.finetune_of(model).objective
        return (objective.teacher or model) if objective.kl else None

    def teacher_of_arms(self, ablation: str) -> str | None:
        """Return the name of the model that the arms of an ablation learn from, or None."""
        one = self.ablations[ablation]
        objective = one.finetune.objective
        return (objective.teacher or one.start.model) if objective.kl else None

    def evaluate_of(self, model: str) -> Evaluate:
        """Return the section `evaluate` of a model, without the parts that do not apply to its kind."""
        return self.sections.evaluate_of[model]

    def calibration_of(self, model: str) -> Calibration:
        """Return the data on which a model is calibrated."""
        return self.sections.calibration_of[model]

    def is_evaluated_alike(self, model: str) -> bool:
        """Return whether a model is evaluated by the study's own section."""
        return self.evaluate_of(model) is self.evaluate

    def criteria_of(self, model: str) -> dict[str, Record]:
        """Return {name: criterion} of a model: those that its evaluation can serve."""
        return self._criteria[model]

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
        active = self.active_configs()
        return [
            (model, config) for model in self.active_models() for config in self.criteria_of(model) if config in active
        ]

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

    def training_datasets(self, model: str) -> list[str]:
        """Return the names of the data sets that a model is trained and validated on."""
        return list(dataset_uses.names_in(self.finetune_of(model).data))

    def ablation_datasets(self, ablation: str) -> list[str]:
        """Return the names of the data sets that the arms of an ablation are trained and validated on."""
        return list(dataset_uses.names_in(self.ablations[ablation].finetune.data))

    def measured_datasets(self) -> list[str]:
        """Return the names of the texts, tasks and data sets that some model of the run is evaluated on."""
        return list(
            dict.fromkeys(
                name for model in self.active_models() for name in own_sections.names_in(self.evaluate_of(model))
            )
        )

    def needs_bos(self, model: str) -> bool:
        """Return True if a perplexity protocol of the model begins every window with BOS."""
        perplexity = self.evaluate_of(model).perplexity
        names = [perplexity.protocol] if isinstance(perplexity.protocol, str) else perplexity.protocol
        places = [
            (perplexity.protocols[name].bos if name in perplexity.protocols else None)
            or perplexity.bos
            or ("every-window" if name in registry.PROTOCOLS_WITH_BOS else None)
            for name in names
        ]
        return bool(perplexity.datasets) and "every-window" in places

    def training_seeds(self, model: str) -> list[int]:
        """Return the seeds that every training of a model is repeated with.

        The first seed's files are at the usual paths.
        """
        return self.finetune_of(model).seeds or [self.seed]

    def more_seeds(self, model: str) -> list[int]:
        """Return the seeds after the first."""
        return self.training_seeds(model)[1:]

    @staticmethod
    def seed_folder(seed: int) -> str:
        """Return the suffix that the paths of a training with this additional seed have."""
        return f"/seed-{seed}"

    def seed_folders(self) -> str:
        """Return a regular expression that matches every such suffix and the empty string."""
        every = dict.fromkeys(seed for model in self.models for seed in self.more_seeds(model))
        return "(?:{})?".format("|".join(map(self.seed_folder, every)) or "/seed-none")

    def seed_in(self, model: str, folder: str) -> int:
        """Return the seed of a `seed_folder` suffix; an empty suffix means the first seed of the model."""
        return int(folder.rpartition("-")[2]) if folder else self.training_seeds(model)[0]

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
    models = {name: resolve_model(name, entry, workdir, notices) for name, entry in config.models.items()}
    sections = own_sections.resolve(config, models, workdir, notices)
    config = config.model_copy(update={"finetune": sections.finetune, "evaluate": sections.evaluate})
    dataset_uses.check_known(config, models, sections)
    by_model = {name: criteria.measured(evaluate) for name, evaluate in sections.evaluate_of.items()}
    candidates, rows, columns = _candidates(config, models, by_model, workdir, notices)
    of_models = {name: kinds.named(model.kind) for name, model in models.items()}
    evaluators = {name for kind in of_models.values() for name in kind.evaluators}
    measured = criteria.Measured(by_model, columns, evaluators, config.datasets)
    chosen = criteria.resolve(config, measured, rows, notices)
    datasets = dataset_uses.resolve(config, models, sections, chosen, workdir, notices)
    ablated = ablations.resolve(config, of_models, sections, chosen, workdir, notices)
    study = Study(config, models, datasets, workdir, sections, notices, chosen, candidates, ablated)
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


def _candidates(
    config: Config,
    models: Mapping[str, StudyModel],
    measured: Mapping[str, list[str]],
    workdir: str,
    notices: list[str],
) -> tuple[dict[str, dict[str, Record]], list[Record], list[str]]:
    """Return (candidates by model, rows, columns); rows and columns are those of the table, empty without one.

    Args:
        config: the configuration.
        models: its models.
        measured: model -> the metrics by which its candidates are scored.
        workdir: the folder that relative paths resolve against.
        notices: a list to which notices are added.
    """
    settings = config.candidates
    if settings.table is None:
        grids = {}
        for name, model in config.models.items():
            own = model.prune is not None
            key = f"models.{name}.prune" if own else "candidates.prune"
            grids[name] = candidate_lists.grid(model.prune if own else settings.prune, key)
            _check_towers(grids[name].values(), key, name, kinds.named(models[name].kind))
        return grids, [], []
    everywhere = {metric for names in measured.values() for metric in names}
    columns, rows = candidate_lists.table(settings.table, workdir, everywhere)
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


def _check_towers(points: Iterable[Record], key: str, model: str, kind: kinds.ModelKind) -> None:
    """Reject a grid point whose tower the kind of the model does not have."""
    for place, point in enumerate(points):
        tower = point.get("tower")
        if tower is not None and tower not in kind.pruned_towers:
            valid = ", ".join(kind.pruned_towers)
            raise SettingsError(
                f"config key {key}[{place}].tower: found '{tower}', but of {kind.noun} ({model}) Coppice prunes {valid}"
                f"{nearest(tower, kind.pruned_towers)}"
            )


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
    kind = kinds.named(model.kind)
    if model.model_type not in kind.prunable:
        raise SettingsError(f"config key models.{name}.base: {kind.cannot_prune(model.model_type)}")


def _notice_split(study: Study) -> None:
    if study.select.split == "report":
        study.notices.append(
            "config key select.split: candidates are chosen on the rows that the reports use, so the reports are too "
            "favorable to the chosen candidates"
        )
