"""Find the data sets that a study reads, and what it needs of each: the roles of its rows and its columns."""

import itertools
from collections.abc import Iterator

from coppice.core.errors import SettingsError, nearest

from . import criteria, registry
from .resolved import StudyDataset
from .sections import Config
from .sections.data_sets import Dataset
from .sections.finetune import TrainingData
from .sources import resolve_dataset, with_roles

Use = tuple[str, str, str]  # (data set, role, configuration key that needs it)


def completed(name: str, entry: Dataset) -> Dataset:
    """Return a data set's entry, completed from the official data set of its name."""
    return Dataset.model_validate(registry.completed(name, entry.model_dump(exclude_unset=True)))


def names_in(chosen: TrainingData) -> dict[str, str]:
    """Return {data set: the key of the section finetune.data that names it}."""
    trained = [chosen.dataset] if isinstance(chosen.dataset, str) else chosen.dataset
    if not trained:
        raise SettingsError("config key finetune.data.dataset: names no data set; name at least one")
    validation = {chosen.validation: "validation"} if chosen.validation else {}
    return dict.fromkeys(trained, "dataset") | validation


def _uses(config: Config) -> Iterator[Use]:
    """Yield (data set, role, configuration key that needs it) of everything the study reads."""
    for name, key in names_in(config.finetune.data).items():
        yield name, "train", f"finetune.data.{key}"
    for name in config.evaluate.perplexity.datasets:
        yield name, "report", "evaluate.perplexity.datasets"
    yield from _uses_of_protocols(config)
    for name, entry in config.ablations.items():
        if entry.start.model in (None, *config.models):
            for dataset, key in names_in(config.finetune.data.model_copy(update=entry.data.given())).items():
                yield dataset, "train", f"ablations.{name}.data.{key}"
    if config.candidates.table is None:
        yield config.candidates.calibration.dataset, "train", "candidates.calibration.dataset"
    if config.miniature.corpus != "world":
        yield config.miniature.corpus, "train", "miniature.corpus"
    for task in config.evaluate.zero_shot.tasks:
        if task in config.datasets:
            yield task, "report", "evaluate.zero_shot.tasks"


def _uses_of_protocols(config: Config) -> Iterator[Use]:
    """Yield the same triples for texts whose perplexity protocol reads rows of another role than "report"."""
    perplexity, key = config.evaluate.perplexity, "evaluate.perplexity.protocol"
    names = [perplexity.protocol] if isinstance(perplexity.protocol, str) else perplexity.protocol
    for name, text in itertools.product(names, perplexity.datasets):
        own = perplexity.protocols.get(name)
        role = own.role if own else registry.PROTOCOL_ROLES.get(name, {}).get(text)
        if role in ("train", "selection"):
            yield text, role, key
        # Candidates are scored by the first protocol, and never on rows that reports use: if the protocol reports on
        # selection rows, candidates are scored on train rows.
        if role == "selection" and name == names[0] and _scores_by(config, text):
            yield text, "train", key


def _scores_by(config: Config, text: str) -> bool:
    """Return whether candidates that Coppice prunes are scored on a text."""
    here = config.candidates.table is None and config.select.split == "selection"
    texts = config.evaluate.perplexity.datasets
    return here and text in criteria.scored_texts(criteria.completed(config).values(), texts)


TEXT_USES = ("evaluate.perplexity.datasets", "candidates.calibration.dataset", "miniature.corpus")


def _purposes(config: Config) -> dict[str, set[str]]:
    """Return {data set: uses}; the uses "text" and "training" say which columns it needs besides those of a task."""
    found = {}
    for name, _, key in _uses(config):
        purpose = "text" if key in TEXT_USES else "training" if key.startswith("finetune.") else None
        found.setdefault(name, set()).update({purpose} - {None})
    return found


def resolve(config: Config, workdir: str, notices: list[str]) -> dict[str, StudyDataset]:
    """Return the data sets that the study reads. Raises SettingsError if one is missing or lacks a role."""
    resolved, needed, entries, purposes = {}, {}, config.datasets, _purposes(config)
    valid = [*entries, *(name for name in registry.DATASETS if name not in entries)]
    for name, role, key in _uses(config):
        if name not in valid:
            raise SettingsError(
                f"config key {key}: there is no data set '{name}' under datasets; there are {', '.join(valid)}"
                f"{nearest(name, valid)}"
            )
        if name not in resolved:
            entry = entries.get(name) or completed(name, Dataset())
            found = resolve_dataset(name, entry, config.data_root, workdir, notices)
            resolved[name] = found.model_copy(update={"uses": sorted(purposes[name])})
        needed.setdefault(name, {}).setdefault(role, key)
    return {name: with_roles(name, entry, needed[name]) for name, entry in resolved.items()}
