"""Resolve the configuration into a `Study`: models, criteria, candidates, data sets and ablations that fit together."""

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from coppice.core.errors import SettingsError, nearest

from .. import layout
from . import ablations, arms, candidate_lists, checking, criteria, lora_presets, registry, task_metrics
from . import config_files as strict
from .sections import Config, Dataset
from .sources import (
    absolute,
    check_held_out,
    check_name,
    check_paths,
    folder,
    resolve_dataset,
    resolve_model,
    with_roles,
)


@dataclass(frozen=True)
class Study:
    """A resolved configuration, as `load` returns it. Every mapping keeps the order of the configuration.

    `models`, `configs` and `datasets` map names to plain dictionaries. A model or data set also has
    `source: {kind: hub|local|miniature, path}`. `notices` are messages to the user about entries that are ignored.
    """

    config: dict
    models: dict
    configs: dict
    datasets: dict
    workdir: str
    notices: list = field(default_factory=list)
    _candidates: dict = field(default_factory=dict)
    ablations: dict = field(default_factory=dict)

    results = property(lambda self: self.config["results"])
    resources = property(lambda self: self.config["resources"])
    seed = property(lambda self: self.config["seed"])
    finetune = property(lambda self: self.config["finetune"])
    evaluate = property(lambda self: self.config["evaluate"])
    select = property(lambda self: self.config["select"])
    miniature = property(lambda self: self.config["miniature"])
    calibration = property(lambda self: self.config["candidates"]["calibration"])
    resources_per_job = property(lambda self: self.config["resources_per_job"])
    threads_per_job = property(lambda self: self.config["threads_per_job"])

    def active_models(self):
        """Return the names of the models to run: those of `only.models`, else all."""
        only = self.config["only"]["models"]
        return [name for name in self.models if only is None or name in only]

    def active_configs(self):
        """Return the names of the criteria to run: those of `only.configs`, else all."""
        only = self.config["only"]["configs"]
        return [name for name in self.configs if only is None or name in only]

    def pairs(self):
        """Return (model, config) of every pair to run."""
        return [(model, config) for model in self.active_models() for config in self.active_configs()]

    def candidates(self, model):
        """Return the model's candidates by name: grid points (with `method`) or table rows (with `path`)."""
        return self._candidates[model]

    def ablated_by(self):
        """Return the names of the texts and tasks whose selection rows rank the arms of some ablation."""
        chosen = [lists for one in self.ablations.values() for lists in arms.chosen_by(one).values()]
        return {name for lists in chosen for names in lists.values() for name in names}

    def training_datasets(self, finetune=None):
        """Return the names of the data sets that `finetune` (default: the study's) trains and validates on."""
        return list(_training_datasets((finetune or self.finetune)["data"]))

    def training_seeds(self):
        """Return the seeds that every training is repeated with. The first seed's files are at the usual paths."""
        return self.finetune["seeds"] or [self.seed]

    def more_seeds(self):
        """Return the seeds after the first."""
        return self.training_seeds()[1:]

    @staticmethod
    def seed_folder(seed):
        """Return the suffix that the paths of a training with this additional seed have."""
        return f"/seed-{seed}"

    def seed_folders(self):
        """Return a regular expression that matches every such suffix and the empty string."""
        return "(?:{})?".format("|".join(map(self.seed_folder, self.more_seeds())) or "/seed-none")

    def seed_in(self, folder):
        """Return the seed of a `seed_folder` suffix; an empty suffix means the first seed."""
        return int(folder.rpartition("-")[2]) if folder else self.training_seeds()[0]

    def defines(self, task):
        """Return whether the user's own folder defines the task."""
        place = self.evaluate["zero_shot"]["include_path"]
        return place is not None and task in registry.tasks_in(place).files

    def dataset(self, name):
        """Return the resolved entry of a data set; None for a task without one, which uses its official data."""
        return self.datasets.get(name)


def load(raw_config, configfiles=(), workdir=None):
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
    workdir = os.path.abspath(workdir or Path.cwd())
    checked = checking.checked(Config, raw_config)
    config = checked.model_dump() | {"datasets": {name: _dataset(name, own) for name, own in checked.datasets.items()}}
    notices = []
    for key in ("results", "resources"):
        config[key] = folder(config[key], key, workdir)
    _check_names(config)
    _restrict(config, raw_config, notices)
    _check_training(config["finetune"])
    config["finetune"]["lora"] = lora_presets.resolve(config["finetune"]["lora"])
    models = {name: resolve_model(name, entry, workdir, notices) for name, entry in config["models"].items()}
    _check_tasks(config["evaluate"]["zero_shot"], workdir, notices)
    _check_protocols(config["evaluate"]["perplexity"])
    datasets = _resolve_datasets(config, workdir, notices)
    candidates, rows, columns = _candidates(config, workdir, notices)
    configs = criteria.resolve(config, rows, columns)
    ablated = ablations.resolve(config, workdir, notices)
    study = Study(config, models, configs, datasets, workdir, notices, candidates, ablated)
    _check_candidates(study)
    _notice_split(study)
    return study


def _dataset(name, entry):
    """Return the settings of a data set, completed from the official data set of its name."""
    return Dataset.model_validate(registry.completed(name, entry.model_dump(exclude_unset=True))).model_dump()


def _check_names(config):
    for section, entries in (
        ("models", config["models"]),
        ("select.configs", config["select"]["configs"]),
        ("datasets", config["datasets"]),
    ):
        for name in entries:
            check_name(name, f"config key {section}")
    if not config["models"]:
        raise SettingsError("the study has no model; add one under config key models")
    if not config["select"]["configs"]:
        raise SettingsError("the study has no config; add one under config key select.configs")


def _restrict(config, raw, notices):
    """Restrict `only` to names in the study. Dropped names get a notice, unknown names raise SettingsError."""
    raw_configs = (raw.get("select") or {}).get("configs") or {}
    for key, entries, given in (
        ("models", config["models"], raw.get("models") or {}),
        ("configs", config["select"]["configs"], raw_configs),
    ):
        names = config["only"][key]
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
        config["only"][key] = [name for name in names if name in entries]
        if not config["only"][key]:
            raise SettingsError(f"config key only.{key}: selects none of the study's {key}: {', '.join(entries)}")


def _check_training(finetune):
    size = finetune["data"]["val_size"]
    if size >= 1 and size != int(size):
        raise SettingsError(
            f"config key finetune.data.val_size: found {size}; give a whole number of rows, or a share below 1"
        )
    check_held_out(finetune["data"], "config key finetune.data")
    if finetune["early_stopping"] and not (size or finetune["data"]["validation"]):
        raise SettingsError(
            "config key finetune.early_stopping: needs a validation loss; set finetune.data.val_size or .validation"
        )


def _check_tasks(zero_shot, workdir, notices):
    key = "config key evaluate.zero_shot.tasks"
    own = _included(zero_shot, workdir)
    for task in zero_shot["tasks"]:
        check_name(task, key)
        if task in own.files or task in registry.TASKS or task in registry.harness_tasks().files:
            _check_metric(zero_shot, task, own.files)
            continue
        if task in own.groups | registry.harness_tasks().groups:
            raise SettingsError(f"{key}: '{task}' is a group of tasks; name the tasks themselves")
        if not registry.harness_tasks().files:
            notices.append(f"{key}: '{task}' was not checked because lm-eval is not installed here")
            continue
        close = nearest(task, [*own.files, *registry.TASKS]) or nearest(task, registry.harness_tasks().files)
        raise SettingsError(f"{key}: lm-eval has no task '{task}'{close}")
    valid = {*zero_shot["tasks"], *registry.TASKS}
    for task in zero_shot["metric"]:
        if task not in valid:
            raise SettingsError(
                f"config key evaluate.zero_shot.metric.{task}: '{task}' is not among evaluate.zero_shot.tasks"
                f"{nearest(task, valid)}"
            )


def _check_metric(zero_shot, task, own):
    """Raise SettingsError if the task does not have its configured metric, or if the user's definition is broken."""
    wanted = zero_shot["metric"].get(task)
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


def _included(zero_shot, workdir):
    """Return the tasks in the folder `include_path`, and make that path absolute in `zero_shot`."""
    if zero_shot["include_path"] is None:
        return registry.Tasks({}, frozenset())
    given, key = zero_shot["include_path"], "config key evaluate.zero_shot.include_path"
    zero_shot["include_path"] = absolute(given, workdir)
    if not os.path.isdir(zero_shot["include_path"]):
        raise SettingsError(f"{key}: there is no folder {given} (looked at {zero_shot['include_path']})")
    found = registry.tasks_in(zero_shot["include_path"])
    if not found.files:
        raise SettingsError(f"{key}: no .yaml file in {given} defines a task")
    check_paths(layout.definition_files(zero_shot["include_path"]), key)
    return found


def _check_protocols(perplexity):
    own, key = perplexity["protocols"], "config key evaluate.perplexity"
    for name, protocol in own.items():
        check_name(name, f"{key}.protocols")
        if name in registry.PROTOCOLS:
            raise SettingsError(f"{key}.protocols.{name}: Coppice has a protocol of this name; choose another name")
        if (protocol["stride"] or 1) > protocol["seq_len"]:
            raise SettingsError(
                f"{key}.protocols.{name}.stride: found {protocol['stride']}, must be at most seq_len "
                f"({protocol['seq_len']}); a larger stride would skip tokens between windows"
            )
    names, valid = perplexity["protocol"], [*registry.PROTOCOLS, *own]
    for name in [names] if isinstance(names, str) else names:
        if name not in valid:
            raise SettingsError(f"{key}.protocol: found '{name}'; valid are {', '.join(valid)}{nearest(name, valid)}")


def _training_datasets(chosen):
    """Return {data set: the key of the section finetune.data that names it}."""
    trained = [chosen["dataset"]] if isinstance(chosen["dataset"], str) else chosen["dataset"]
    if not trained:
        raise SettingsError("config key finetune.data.dataset: names no data set; name at least one")
    validation = {chosen["validation"]: "validation"} if chosen["validation"] else {}
    return dict.fromkeys(trained, "dataset") | validation


def _uses(config):
    """Yield (data set, role, configuration key that needs it) of everything the study reads."""
    for name, key in _training_datasets(config["finetune"]["data"]).items():
        yield name, "train", f"finetune.data.{key}"
    for name in config["evaluate"]["perplexity"]["datasets"]:
        yield name, "report", "evaluate.perplexity.datasets"
    yield from _uses_of_protocols(config)
    for name, entry in config["ablations"].items():
        if entry["start"].get("model") in (None, *config["models"]):
            for dataset, key in _training_datasets(config["finetune"]["data"] | entry["data"]).items():
                yield dataset, "train", f"ablations.{name}.data.{key}"
    if config["candidates"]["table"] is None:
        yield config["candidates"]["calibration"]["dataset"], "train", "candidates.calibration.dataset"
    if config["miniature"]["corpus"] != "world":
        yield config["miniature"]["corpus"], "train", "miniature.corpus"
    for task in config["evaluate"]["zero_shot"]["tasks"]:
        if task in config["datasets"]:
            yield task, "report", "evaluate.zero_shot.tasks"


def _uses_of_protocols(config):
    """Yield the same triples for texts whose perplexity protocol reads rows of another role than "report"."""
    perplexity, key = config["evaluate"]["perplexity"], "evaluate.perplexity.protocol"
    names = [perplexity["protocol"]] if isinstance(perplexity["protocol"], str) else perplexity["protocol"]
    for name, text in itertools.product(names, perplexity["datasets"]):
        role = (perplexity["protocols"].get(name) or {"role": registry.PROTOCOL_ROLES.get(name, {}).get(text)})["role"]
        if role in ("train", "selection"):
            yield text, role, key
        # Candidates are scored by the first protocol, and never on rows that reports use: if the protocol reports on
        # selection rows, candidates are scored on train rows.
        if role == "selection" and name == names[0] and _scores_by(config, text):
            yield text, "train", key


def _scores_by(config, text):
    """Return whether candidates that Coppice prunes are scored on a text."""
    here = config["candidates"]["table"] is None and config["select"]["split"] == "selection"
    texts = config["evaluate"]["perplexity"]["datasets"]
    return here and text in criteria.scored_texts(criteria.completed(config).values(), texts)


TEXT_USES = ("evaluate.perplexity.datasets", "candidates.calibration.dataset", "miniature.corpus")


def _purposes(config):
    """Return {data set: uses}; the uses "text" and "training" say which columns it needs besides those of a task."""
    found = {}
    for name, _, key in _uses(config):
        purpose = "text" if key in TEXT_USES else "training" if key.startswith("finetune.") else None
        found.setdefault(name, set()).update({purpose} - {None})
    return found


def _resolve_datasets(config, workdir, notices):
    resolved, needed, entries, purposes = {}, {}, config["datasets"], _purposes(config)
    valid = [*entries, *(name for name in registry.DATASETS if name not in entries)]
    for name, role, key in _uses(config):
        if name not in valid:
            raise SettingsError(
                f"config key {key}: there is no data set '{name}' under datasets; there are {', '.join(valid)}"
                f"{nearest(name, valid)}"
            )
        if name not in resolved:
            entry = entries.get(name) or _dataset(name, Dataset())
            found = resolve_dataset(name, entry, config["data_root"], workdir, notices)
            resolved[name] = found | {"uses": sorted(purposes[name])}
        needed.setdefault(name, {}).setdefault(role, key)
    return {name: with_roles(name, entry, needed[name]) for name, entry in resolved.items()}


def _candidates(config, workdir, notices):
    """Return (candidates by model, rows, columns); rows and columns are those of the table, empty without one."""
    settings, models = config["candidates"], config["models"]
    if settings["table"] is None:
        grids = {}
        for name, model in models.items():
            own = model["prune"] is not None
            key = f"models.{name}.prune" if own else "candidates.prune"
            grids[name] = candidate_lists.grid(model["prune"] if own else settings["prune"], key)
        return grids, [], []
    columns, rows = candidate_lists.table(settings["table"], workdir, criteria.measured(config["evaluate"]))
    for name in dict.fromkeys(row["model"] for row in rows if row["model"] not in models):
        notices.append(
            f"{settings['table']}: model '{name}' is not in the study; its rows are ignored{nearest(name, models)}"
        )
    rows = [row for row in rows if row["model"] in models]
    by_model = {name: {} for name in models}
    for row in rows:
        # The line number is not part of a candidate: a row inserted above it must not rerun the candidate's jobs
        by_model[row["model"]][row["candidate"]] = {key: value for key, value in row.items() if key != "row"}
    return by_model, rows, columns


def _check_candidates(study):
    settings = study.config["candidates"]
    grids = {tuple(study.candidates(name)) for name in study.active_models()}
    if settings["per_job"] == "all" and len(grids) > 1:
        raise SettingsError(
            "config key candidates.per_job: 'all' needs the same candidates for every model; set it to 'one', or "
            "remove models.*.prune"
        )
    for name in study.active_models():
        if study.candidates(name):
            continue
        if settings["table"] is None:
            key = "candidates.prune" if study.config["models"][name]["prune"] is None else f"models.{name}.prune"
            raise SettingsError(f"config key {key}: is empty, so model '{name}' has no candidate; add a grid point")
        raise SettingsError(
            f"{settings['table']}: has no row for model '{name}'; add one, or exclude the model with only.models"
        )


def _notice_split(study):
    if study.select["split"] == "report":
        study.notices.append(
            "config key select.split: candidates are chosen on the rows that the reports use, so the reports are too "
            "favorable to the chosen candidates"
        )
