"""The sections `finetune`, `evaluate` and `calibration` of each model: the study's with the model's own keys.

A model is evaluated only by what applies to its kind. A model that sets no key and whose kind lacks nothing has the
study's own sections, the same objects, so that its jobs are those of a study without such keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from coppice.core.errors import SettingsError
from coppice.models import kinds

from . import candidate_lists, evaluation_checks, lora_presets, training_checks
from .resolved import StudyModel
from .sections import Config
from .sections.candidates import Calibration
from .sections.evaluate import (
    Answers,
    Classification,
    Cost,
    Evaluate,
    Generation,
    Perplexity,
    Retrieval,
    ZeroShot,
)
from .sections.finetune import Finetune, Lora
from .sections.section import Section
from .sources import check_rows

# section of an evaluator -> its key that lists data sets
DATA = {
    "perplexity": "datasets",
    "zero_shot": "tasks",
    "answers": "datasets",
    "retrieval": "datasets",
    "classification": "datasets",
}
ASKS = DATA | {"generation": "prompts", "cost": "enabled"}  # the key by which any evaluator is asked for something
# section of an evaluator -> the section, switched off
OFF: Mapping[str, Section] = {
    "perplexity": Perplexity(datasets=[]),
    "zero_shot": ZeroShot(tasks=[]),
    "answers": Answers(),
    "retrieval": Retrieval(),
    "classification": Classification(),
    "generation": Generation(prompts=[]),
    "cost": Cost(enabled=False),
}
# Mappings whose entries a model adds to those of the study; any other mapping, such as a mixture, replaces it
JOINED = ("protocols", "towers")

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Sections:
    """The sections of the study and, by name, of its models."""

    finetune: Finetune
    evaluate: Evaluate
    finetune_of: dict[str, Finetune] = field(default_factory=dict)
    evaluate_of: dict[str, Evaluate] = field(default_factory=dict)
    calibration_of: dict[str, Calibration] = field(default_factory=dict)


def resolve(config: Config, models: Mapping[str, StudyModel], workdir: str, notices: list[str]) -> Sections:
    """Return the sections of the study and of its models, completed and checked.

    Args:
        config: the configuration.
        models: its models, with their kinds.
        workdir: the folder that relative paths resolve against.
        notices: a list to which notices are added.

    Raises:
        SettingsError: the message names the key, for a model's own as `models.X.evaluate...`.
    """
    evaluate = evaluation_checks.checked(config.evaluate, "evaluate", workdir, notices)
    found = Sections(_completed(config.finetune, "finetune"), evaluate)
    for name, model in config.models.items():
        kind, key = kinds.named(models[name].kind), f"models.{name}"
        training, evaluation = found.finetune, evaluate
        if model.finetune is not None:
            training = _completed(_with_adapter(config.finetune, model.finetune), f"{key}.finetune")
        if model.evaluate is not None:
            _check_own(model.evaluate, kind, key)
            whole = overlaid(config.evaluate, model.evaluate)
            evaluation = evaluation_checks.checked(whole, f"{key}.evaluate", workdir, notices)
        _check_training_of(training, name, config, models)
        found.finetune_of[name] = training
        found.evaluate_of[name] = applicable(evaluation, kind)
        found.calibration_of[name] = _calibration(config, name, kind, training)
    return found


def key_of(config: Config, model: str, *path: str) -> str:
    """Return the key that sets a value of a model's section: the model's own, such as `models.X.finetune.epochs`.

    If the model does not set it, return that of the study.
    """
    place = config.models[model]
    for name in path:
        if place is None or name not in place.model_fields_set:
            return ".".join(path)
        place = getattr(place, name)
    return ".".join(("models", model, *path))


def overlaid(section: AnySection, own: AnySection) -> AnySection:
    """Return a section with the keys that `own` sets; in sections inside it, too."""
    changes = {}
    for key in own.model_fields_set:
        below, value = getattr(section, key, None), getattr(own, key)
        if isinstance(value, Section) and isinstance(below, Section):
            changes[key] = overlaid(below, value)
        else:
            changes[key] = below | value if key in JOINED else value
    return section.model_copy(update=changes)


def applicable(evaluate: Evaluate, kind: kinds.ModelKind) -> Evaluate:
    """Return a section without the parts that do not apply to a kind of model."""
    without = {name: off for name, off in OFF.items() if name not in kind.evaluators and getattr(evaluate, name) != off}
    return evaluate.model_copy(update=without) if without else evaluate


def data_of(evaluate: Evaluate) -> dict[str, list[str]]:
    """Return {section: the names of the texts, tasks or data sets that it lists}."""
    return {name: getattr(getattr(evaluate, name), key) for name, key in DATA.items()}


def names_in(evaluate: Evaluate) -> list[str]:
    """Return the names of all texts, tasks and data sets of an evaluation."""
    return list(dict.fromkeys(name for names in data_of(evaluate).values() for name in names))


def _with_adapter(study: Finetune, own: Finetune) -> Finetune:
    """Return the section `finetune` of a model. A preset of its own replaces the study's adapter."""
    if "lora" in own.model_fields_set and own.lora.preset is not None:
        study = study.model_copy(update={"lora": Lora()})
    return overlaid(study, own)


def _completed(finetune: Finetune, section: str) -> Finetune:
    """Return a section `finetune` with every key of the adapter filled. Raises SettingsError if keys conflict."""
    key, size = f"config key {section}", finetune.data.val_size
    if size >= 1 and size != int(size):
        raise SettingsError(f"{key}.data.val_size: found {size}; give a whole number of rows, or a share below 1")
    check_rows(finetune.data, f"{key}.data")
    if finetune.early_stopping and not (size or finetune.data.validation):
        raise SettingsError(
            f"{key}.early_stopping: needs a validation loss; set {section}.data.val_size or .validation"
        )
    lora = Lora.model_validate(lora_presets.resolve(finetune.lora.model_dump()))
    return finetune.model_copy(update={"lora": lora})


def _check_own(own: Evaluate, kind: kinds.ModelKind, key: str) -> None:
    """Reject a part that a model asks for itself although it does not apply to its kind."""
    for name in own.model_fields_set & ASKS.keys():
        part, asks = getattr(own, name), ASKS[name]
        if name not in kind.evaluators and asks in part.model_fields_set and getattr(part, asks):
            raise SettingsError(
                f"config key {key}.evaluate.{name}: does not apply to {kind.noun}; remove it, or correct {key}.kind"
            )
    if "include_path" in own.zero_shot.model_fields_set:
        raise SettingsError(
            f"config key {key}.evaluate.zero_shot.include_path: the folder of task definitions is the same for all "
            "models; set evaluate.zero_shot.include_path"
        )


def _calibration(config: Config, model: str, kind: kinds.ModelKind, finetune: Finetune) -> Calibration:
    """Return the calibration data of a model. Kinds that do not read plain text use their training data by default."""
    section, own = config.candidates.calibration, config.models[model].calibration
    section = section if own is None else overlaid(section, own)
    if "text" not in kind.row_kinds and (own is None or "dataset" not in own.model_fields_set):
        trained = finetune.data.dataset
        section = section.model_copy(update={"dataset": trained if isinstance(trained, str) else next(iter(trained))})
    return candidate_lists.calibration(section)


def _check_training_of(finetune: Finetune, model: str, config: Config, models: Mapping[str, StudyModel]) -> None:
    """Reject a value that the kind of a model does not have, or with which it would learn nothing."""
    kind = kinds.named(models[model].kind)

    def key(*path: str) -> str:
        return f"config key {key_of(config, model, 'finetune', *path)}"

    who, best_by = f"{kind.noun} ({model})", finetune.best_by
    if best_by is not None and best_by not in kind.validators:
        training_checks.reject(key("best_by"), best_by, f"{who} is validated by", ["the loss (null)", *kind.validators])
    if best_by is not None and not (finetune.data.val_size or finetune.data.validation):
        raise SettingsError(
            f"{key('best_by')}: needs rows held out from training; set finetune.data.val_size or .validation"
        )
    _check_objective(finetune, model, config, models)
    training_checks.check_towers(finetune.lora.towers, kind, who, key("lora", "towers"))
    training_checks.check_batch(finetune.batch_size, kind, who, key("batch_size"))
    if finetune.arrangement not in (None, *kind.arrangements):
        training_checks.reject(
            key("arrangement"), finetune.arrangement, f"{who} is trained with", [*kind.arrangements, "null"]
        )
    if finetune.data.train_on_inputs and not kind.learns_inputs:
        raise SettingsError(f"{key('data', 'train_on_inputs')}: {who} does not write its inputs; set it to false")


def _check_objective(finetune: Finetune, model: str, config: Config, models: Mapping[str, StudyModel]) -> None:
    """Reject an objective that a model cannot be trained on, or that would do nothing."""
    kind = kinds.named(models[model].kind)
    objective, key = finetune.objective, f"config key {key_of(config, model, 'finetune', 'objective')}"
    if idle := objective.idle():
        raise SettingsError(f"{key}.{idle[0]}: has no effect while kl is 0; set {key.split()[-1]}.kl, or remove it")
    if not objective.kl:
        return
    if not kind.distills:
        raise SettingsError(
            f"{key}.kl: {kind.noun} ({model}) cannot be trained on a teacher's predictions; set it to 0"
        )
    teacher = objective.teacher
    if teacher is None:
        return
    if teacher not in models:
        training_checks.reject(f"{key}.teacher", teacher, "the study has the models", models)
    other = kinds.named(models[teacher].kind)
    if other is not kind:
        raise SettingsError(
            f"{key}.teacher: {teacher} is {other.noun}, but {model} is {kind.noun}; name a model of the same kind"
        )
