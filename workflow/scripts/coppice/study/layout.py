"""Paths of a study's files, shared by the rules, the reports and `coppice trace`.

Patterns use the workflow's wildcards: {model}, {config}, {candidate}. This module builds paths; it reads no record.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core import fingerprints
from coppice.core.aliases import PathLike, Record

if TYPE_CHECKING:
    from .settings import Study
    from .settings.resolved import Source

TUNED = "_finetuned"  # suffix of a config's name in the folders of fine-tuned models
EVALUATION = "evaluation_results.json"
COMPARISON = "comparison.json"
REPORT = "report"
BY_CANDIDATE = "by_candidate"
# The files that define a checkpoint, besides its weights and its tokenizer
CHECKPOINT = ("config.json", "generation_config.json", "pruned_shapes.json", "*.index.json", "*.tiktoken", "*.py")
# kind of record -> (its folder inside the results folder, its file name)
RECORDS = {
    "candidate": ("candidates/{model}/{candidate}", "pruning.json"),
    "scores": ("candidate_evaluation/{model}/{candidate}", EVALUATION),
    "selection": ("for_finetuning/{model}/{config}", "selection_info.json"),
    "training": (f"finetuned/{{model}}/{{config}}{TUNED}", "finetuning_config.json"),
    "dense": ("dense_evaluation/{model}", EVALUATION),
    "pruned": ("pruned_evaluation/{model}/{config}", EVALUATION),
    "finetuned": (f"finetuned_evaluation/{{model}}/{{config}}{TUNED}", EVALUATION),
    "latency": ("latency/{model}", "latency.json"),
}


def folder(results: PathLike, kind: str) -> str:
    """Return the path pattern of the folder that holds records of this kind."""
    return f"{results}/{RECORDS[kind][0]}"


def record(results: PathLike, kind: str) -> str:
    """Return the path pattern of a record of this kind."""
    return f"{folder(results, kind)}/{RECORDS[kind][1]}"


def by_candidate(results: PathLike, kind: str) -> str:
    """Return the path pattern of the folder where a candidate's training or evaluation lies, for all configs.

    The folder of each config that chose the candidate (see `folder`) shows what is in it. kind: training, pruned or
    finetuned.
    """
    return f"{results}/{BY_CANDIDATE}/{{model}}/{{candidate}}/{root(kind)}"


def root(kind: str) -> str:
    """Return the top-level folder, inside the results folder, of all records of this kind."""
    return RECORDS[kind][0].partition("/")[0]


def results_above(path: PathLike) -> Path | None:
    """Return the results folder that `path` belongs to, or None.

    path: the results folder itself, its report folder, or a file in that report folder.
    """
    path = Path(path)
    places = [path, *([path.parent] if path.name == REPORT else [path.parent.parent] * (path.parent.name == REPORT))]
    return next((place for place in places if any((place / root(kind)).is_dir() for kind in RECORDS)), None)


def of_pair(results: PathLike, model: str, config: str, seed: int | None = None) -> dict[str, Path]:
    """Return {kind: path} of a pair's records: selection, training, the evaluation of each stage, comparison.

    seed: if given, the training and its evaluation are those of this additional seed, in its `seed-<n>/` folder.
    """
    kinds = ("selection", "training", "dense", "pruned", "finetuned")
    paths = {kind: Path(record(results, kind).format(model=model, config=config)) for kind in kinds}
    paths["comparison"] = paths["finetuned"].with_name(COMPARISON)
    if seed is not None:
        for kind in ("training", "finetuned"):
            paths[kind] = paths[kind].parent / f"seed-{seed}" / paths[kind].name
    return paths


def chosen_folder(selection: PathLike, record: Record) -> Path:
    """Return the folder of the chosen candidate.

    The candidate is looked for in the results folder that holds the selection, because a user may have moved or
    renamed that folder. If it is not there, the path that the selection recorded is returned.

    Args:
        selection: path of selection_info.json.
        record: its content.
    """
    kept, name = RECORDS["candidate"]
    beside = Path(os.path.relpath(Path(selection).absolute().parents[3] / kept.format(**record)))
    return beside if (beside / name).is_file() else Path(record["source_path"])


def seal_of(table: PathLike) -> Path:
    """Return the path of the record beside a table. It holds the table's digest, so that manual edits are detected."""
    return Path(table).with_name(f".{Path(table).stem}.json")


def config_file(study: Study, model: str) -> str:
    """Return the path of a dense model's config.json, whether or not the file exists yet."""
    source = study.models[model].source
    if source.kind == "local":
        return f"{source.path}/config.json"
    if source.kind == "miniature":
        return f"{study.resources}/miniature/models/{source.path}/checkpoint/config.json"
    return f"{study.resources}/models/{model}/config.json"


def local_files(source: Source, splits: Iterable[str | None] = ()) -> list[str]:
    """Return the files of a model or data set; none unless its source is local. splits: as for `files_below`."""
    return files_below(source.path, splits) if source.kind == "local" else []


def files_below(path: PathLike, splits: Iterable[str | None] = ()) -> list[str]:
    """Return a local file, or those of a folder, which rules declare as inputs so that a change reruns them.

    splits: paths of further files relative to the folder; names that are not such files are ignored.
    """
    path = Path(path)
    if not path.is_dir():
        return [str(path)]
    named = [path / split for split in splits if split]
    return sorted({str(file) for file in [*path.iterdir(), *named] if file.is_file()})


def candidate_files(folder: PathLike) -> list[str]:
    """Return the checkpoint files of a user's own candidate.

    Other files in the folder are left out: rules do not track them, so editing a README there reruns nothing.
    """
    with os.scandir(folder) as entries:  # one directory listing per candidate: a table may have thousands of rows
        names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    weights = next((found for kind in fingerprints.WEIGHTS if (found := fnmatch.filter(names, kind))), [])
    others = {name for kind in (*CHECKPOINT, *fingerprints.TOKENIZER) for name in fnmatch.filter(names, kind)}
    return sorted(str(Path(folder, name)) for name in others.union(weights))


def definition_files(folder: PathLike) -> list[str]:
    """Return all files in a folder of task definitions, without Python's caches."""
    files = Path(folder).rglob("*")
    return sorted(str(file) for file in files if file.is_file() and "__pycache__" not in file.parts)


class Files:
    """The input files of one study's jobs, by the names of models and data sets."""

    def __init__(self, study: Study) -> None:
        """Name the files of `study`."""
        self.study, self.resources = study, study.resources

    def dataset(self, name: str) -> str:
        """Return the path of a prepared data set's record. Generated data sets lie in a folder of their own."""
        entry = self.study.dataset(name)
        if entry and entry.source.kind == "miniature":
            return self.generated(entry.source.path)
        return f"{self.resources}/datasets/{name}/dataset.json"

    def datasets(self, names: Iterable[str]) -> list[str]:
        """Return the paths of several data sets' records."""
        return [self.dataset(name) for name in names]

    def dataset_sources(self, name: str) -> list[str]:
        """Return the files that a local data set is read from.

        For a task that uses its official data, return the user's definition files, which say which data that is.
        """
        entry = self.study.dataset(name)
        if entry is None:
            # Python files of a definition are left out: a change of scoring code must not fetch the data again
            files = self.task_definitions() if self.study.defines(name) else []
            return [file for file in files if not file.endswith(".py")]
        return local_files(entry.source, entry.splits.model_dump().values())

    def by_name(self, names: Iterable[str]) -> dict[str, str]:
        """Return {name: path of the record} of several data sets."""
        return {name: self.dataset(name) for name in names}

    def model(self, name: str) -> str:
        """Return the path of a dense model's record."""
        source = self.study.models[name].source
        if source.kind == "miniature":
            return self._miniature(source.path)
        return f"{self.resources}/models/{name}/model.json"

    def _miniature(self, name: str) -> str:
        return f"{self.resources}/miniature/models/{name}/model.json"

    def local_configuration(self, model: str) -> list[str]:
        """Return the config.json in a local model's folder; [] for a model from the hub."""
        return [config_file(self.study, model)] if self.study.models[model].source.kind == "local" else []

    def checked_configuration(self, model: str) -> list[str]:
        """Return the copy of a model's config.json that the pruning grid was checked against.

        The list is empty for miniatures, and if the user's own table replaces the grid.
        """
        if self.study.config.candidates.table is not None:
            return []
        kind = self.study.models[model].source.kind
        return [] if kind == "miniature" else [f"{self.resources}/models/{model}/config.json"]

    def task_definitions(self) -> list[str]:
        """Return the files of the user's own task definitions."""
        place = self.study.evaluate.zero_shot.include_path
        return definition_files(place) if place else []

    def miniature_corpus(self) -> list[str]:
        """Return the records of the text that the miniature models are trained on."""
        corpus = self.study.miniature.corpus
        if corpus != "world":
            return [self.dataset(corpus)]
        return [self.generated(name) for name in ("pretraining", "wikitext2", "ptb")]

    def miniature_parents(self, name: str) -> list[str]:
        """Return what a miniature model needs besides the corpus: an instruct model needs its base and instructions."""
        if not name.endswith("-instruct"):
            return []
        instructions = self.dataset("alpaca") if self.study.dataset("alpaca") else self.generated("alpaca")
        return [self._miniature(name.removesuffix("-instruct")), instructions]

    def generated(self, name: str) -> str:
        """Return the path of the record of a data set of the miniature worlds."""
        return f"{self.resources}/miniature/{name}/dataset.json"
