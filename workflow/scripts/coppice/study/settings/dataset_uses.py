"""Find the data sets that a study reads, and what it needs of each: the roles of its rows and its columns."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from coppice.core.aliases import Record
from coppice.core.errors import SettingsError, nearest
from coppice.models import kinds

from . import criteria, registry
from .own_sections import Sections, key_of
from .resolved import StudyDataset, StudyModel
from .sections import Config
from .sections.data_sets import Dataset
from .sections.evaluate import Evaluate
from .sections.finetune import TrainingData
from .sources import resolve_dataset, with_roles

Criteria = Mapping[str, Mapping[str, Record]]  # model -> name -> criterion
PAIRED = ("answers", "retrieval", "classification")  # sections of `evaluate` whose data sets have columns of their own


class Use(NamedTuple):
    """A use of a data set.

    Attributes:
        name: of the data set.
        role: the role of the rows that are read.
        key: the configuration key that needs it.
        purpose: which columns it needs besides those of a task: text, training, answers, ..., maybe with a colon and
            the kind of model that reads the rows; "" for none.
    """

    name: str
    role: str
    key: str
    purpose: str = ""


def completed(name: str, entry: Dataset) -> Dataset:
    """Return a data set's entry, completed from the official data set of its name."""
    return Dataset.model_validate(registry.completed(name, entry.model_dump(exclude_unset=True)))


def names_in(chosen: TrainingData) -> dict[str, str]:
    """Return {data set: the key of the section that names it}."""
    trained = [chosen.dataset] if isinstance(chosen.dataset, str) else chosen.dataset
    validation = {chosen.validation: "validation"} if chosen.validation else {}
    return dict.fromkeys(trained, "dataset") | validation


def _uses(config: Config, models: Mapping[str, StudyModel], sections: Sections, chosen: Criteria) -> Iterator[Use]:
    """Yield every use of a data set in the study, repeated if several models share it."""
    for model, finetune in sections.finetune_of.items():
        for name, key in names_in(finetune.data).items():
            key = key_of(config, model, "finetune", "data", key)
            yield Use(name, "train", key, _of_kind("training", models[model].kind))
    yield from _uses_of_texts(config, sections, chosen)
    yield from _uses_of_ablations(config, sections)
    if config.candidates.table is None:
        yield from _uses_of_calibration(config, models, sections)
    if config.miniature.corpus != "world":
        yield Use(config.miniature.corpus, "train", "miniature.corpus", "text")
    yield from _uses_of_rows(config, models, sections)


def _of_kind(purpose: str, kind: str) -> str:
    """Return a purpose with the kind of model whose rows it needs; causal-lm, which most studies have, goes unsaid."""
    return purpose if kind == "causal-lm" else f"{purpose}:{kind}"


def _uses_of_texts(config: Config, sections: Sections, chosen: Criteria) -> Iterator[Use]:
    for model, evaluate in sections.evaluate_of.items():
        key = key_of(config, model, "evaluate", "perplexity", "datasets")
        for name in evaluate.perplexity.datasets:
            yield Use(name, "report", key, "text")
    scores = config.candidates.table is None and config.select.split == "selection"
    for model, evaluate in sections.evaluate_of.items():
        key = key_of(config, model, "evaluate", "perplexity", "protocol")
        yield from _uses_of_protocols(evaluate, key, chosen.get(model, {}).values() if scores else [])


def _uses_of_ablations(config: Config, sections: Sections) -> Iterator[Use]:
    for name, entry in config.ablations.items():
        if entry.start.model in (None, *config.models):
            finetune = sections.finetune_of.get(entry.start.model or "", sections.finetune)
            for dataset, key in names_in(finetune.data.model_copy(update=entry.data.given())).items():
                yield Use(dataset, "train", f"ablations.{name}.data.{key}")


def _uses_of_rows(config: Config, models: Mapping[str, StudyModel], sections: Sections) -> Iterator[Use]:
    """Yield the uses of data sets whose rows are answered, retrieved or classified, one by one."""
    for model, evaluate in sections.evaluate_of.items():
        key = key_of(config, model, "evaluate", "zero_shot", "tasks")
        for task in evaluate.zero_shot.tasks:
            if task in config.datasets:
                yield Use(task, "report", key)
        for part in PAIRED:
            for name in getattr(evaluate, part).datasets:
                key = key_of(config, model, "evaluate", part, "datasets")
                yield Use(name, "report", key, _of_kind(part, models[model].kind) if part == "answers" else part)


def _uses_of_calibration(config: Config, models: Mapping[str, StudyModel], sections: Sections) -> Iterator[Use]:
    for model, calibration in sections.calibration_of.items():
        reads_text = "text" in kinds.named(models[model].kind).row_kinds
        key = key_of(config, model, "calibration", "dataset")
        key = key if key.startswith("models.") else f"candidates.{key}"
        yield Use(calibration.dataset, "train", key, "text" if reads_text else f"training:{models[model].kind}")


def _uses_of_protocols(evaluate: Evaluate, key: str, scored: Iterable[Record]) -> Iterator[Use]:
    """Yield the uses of texts whose perplexity protocol reads rows of another role than "report".

    Args:
        evaluate: a section.
        key: of its protocols.
        scored: the criteria by which candidates that Coppice prunes are scored on rows that reports do not use.
    """
    perplexity = evaluate.perplexity
    names = [perplexity.protocol] if isinstance(perplexity.protocol, str) else perplexity.protocol
    for name, text in itertools.product(names, perplexity.datasets):
        own = perplexity.protocols.get(name)
        role = own.role if own else registry.PROTOCOL_ROLES.get(name, {}).get(text)
        if role in ("train", "selection"):
            yield Use(text, role, key)
        # Candidates are scored by the first protocol, and never on rows that reports use: if the protocol reports on
        # selection rows, candidates are scored on train rows.
        if role == "selection" and name == names[0] and text in criteria.scored_texts(scored, perplexity.datasets):
            yield Use(text, "train", key)


def check_known(config: Config, models: Mapping[str, StudyModel], sections: Sections) -> None:
    """Raise SettingsError if the study names a data set that is neither described nor official."""
    valid = [*config.datasets, *(name for name in registry.DATASETS if name not in config.datasets)]
    for use in _uses(config, models, sections, {}):
        if use.name not in valid:
            raise SettingsError(
                f"config key {use.key}: there is no data set '{use.name}' under datasets; there are "
                f"{', '.join(valid)}{nearest(use.name, valid)}"
            )


def resolve(
    config: Config,
    models: Mapping[str, StudyModel],
    sections: Sections,
    chosen: Criteria,
    workdir: str,
    notices: list[str],
) -> dict[str, StudyDataset]:
    """Return the data sets that the study reads.

    Args:
        config: the configuration.
        models: its models.
        sections: those of the study and of its models.
        chosen: the criteria of each model.
        workdir: the folder that relative paths resolve against.
        notices: a list to which notices are added.

    Raises:
        SettingsError: a data set is missing or lacks a role.
    """
    uses = list(_uses(config, models, sections, chosen))
    resolved, needed = {}, {}
    for name, role, key, _ in uses:
        if name not in resolved:
            entry = config.datasets.get(name) or completed(name, Dataset())
            found = resolve_dataset(name, entry, config.data_root, workdir, notices)
            purposes = {use.purpose for use in uses if use.name == name} - {""}
            resolved[name] = found.model_copy(update={"uses": sorted(purposes)})
        needed.setdefault(name, {}).setdefault(role, key)
    return {name: with_roles(name, entry, needed[name]) for name, entry in resolved.items()}
