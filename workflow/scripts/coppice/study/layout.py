"""Where a study's files lie: one place for the rules, the reports and `coppice trace`. No record is read here.

Patterns have the wildcards of the workflow: {model}, {config}, {candidate}.
"""

import fnmatch
import functools
import os
from pathlib import Path

from coppice.core import fingerprints

TUNED = "_finetuned"  # follows the name of a config in the folders of what is fine-tuned
EVALUATION = "evaluation_results.json"
COMPARISON = "comparison.json"
REPORT = "report"
# what decides, beside weights and tokenizer, what a checkpoint is
CHECKPOINT = ("config.json", "generation_config.json", "pruned_shapes.json", "*.index.json", "*.tiktoken", "*.py")
# what a record is of -> its folder below the results, and its name
RECORDS = {
    "candidate": ("candidates/{model}/{candidate}", "pruning.json"),
    "scores": ("candidate_evaluation/{model}/{candidate}", EVALUATION),
    "selection": ("for_finetuning/{model}/{config}", "selection_info.json"),
    "training": (f"finetuned/{{model}}/{{config}}{TUNED}", "finetuning_config.json"),
    "dense": ("dense_evaluation/{model}", EVALUATION),
    "pruned": ("pruned_evaluation/{model}/{config}", EVALUATION),
    "finetuned": (f"finetuned_evaluation/{{model}}/{{config}}{TUNED}", EVALUATION),
}


def folder(results, kind):
    """The pattern of the folder in which a record of this kind lies."""
    return f"{results}/{RECORDS[kind][0]}"


def record(results, kind):
    """The pattern of the record of this kind."""
    return f"{folder(results, kind)}/{RECORDS[kind][1]}"


def root(kind):
    """The folder of all records of this kind, below the results."""
    return RECORDS[kind][0].partition("/")[0]


def results_above(path):
    """The results folder of which `path` is: that folder itself, its report, or a file of its report; else None."""
    path = Path(path)
    places = [path, *([path.parent] if path.name == REPORT else [path.parent.parent] * (path.parent.name == REPORT))]
    return next((place for place in places if any((place / root(kind)).is_dir() for kind in RECORDS)), None)


def of_pair(results, model, config, seed=None):
    """Where the records of a pair lie: selection, training, the three evaluations by stage, comparison.

    seed: of a further training, whose files lie in a folder of its own.
    """
    kinds = ("selection", "training", "dense", "pruned", "finetuned")
    paths = {kind: Path(record(results, kind).format(model=model, config=config)) for kind in kinds}
    paths["comparison"] = paths["finetuned"].with_name(COMPARISON)
    if seed is not None:
        for kind in ("training", "finetuned"):
            paths[kind] = paths[kind].parent / f"seed-{seed}" / paths[kind].name
    return paths


def chosen_folder(selection, record):
    """The folder of the candidate that a choice names (its `record`, which lies at `selection`): in the same results,
    which may have another name by now, else where it lay."""
    kept, name = RECORDS["candidate"]
    beside = Path(os.path.relpath(Path(selection).absolute().parents[3] / kept.format(**record)))
    return beside if (beside / name).is_file() else Path(record["source_path"])


def seal_of(table):
    """The record beside a table, with its digest: what was changed by hand is not taken for what was found."""
    return Path(table).with_name(f".{Path(table).stem}.json")


def config_file(study, model):
    """Where the configuration of a dense model lies once it is known."""
    source = study.models[model]["source"]
    if source["kind"] == "local":
        return f"{source['path']}/config.json"
    if source["kind"] == "miniature":
        return f"{study.resources}/miniature/models/{source['path']}/checkpoint/config.json"
    return f"{study.resources}/models/{model}/config.json"


def local_files(source, splits=()):
    """The files of a local model or data set ({kind, path} or None): a change of theirs is to be noticed.

    splits: names of files below the folder, or of what `data` finds in it by their names.
    """
    if source is None or source["kind"] != "local":
        return []
    path = Path(source["path"])
    if not path.is_dir():
        return [str(path)]
    named = [path / split for split in splits if split]
    return sorted({str(file) for file in [*path.iterdir(), *named] if file.is_file()})


def candidate_files(folder):
    """The files that a user's own candidate rests on: a change of theirs is to be noticed, not one of a note beside."""
    with os.scandir(folder) as entries:  # once: a table may have thousands of rows
        names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    weights = next((found for kind in fingerprints.WEIGHTS if (found := fnmatch.filter(names, kind))), [])
    others = {name for kind in (*CHECKPOINT, *fingerprints.TOKENIZER) for name in fnmatch.filter(names, kind)}
    return sorted(str(Path(folder, name)) for name in others.union(weights))


def definition_files(folder):
    """The files of a folder of task definitions: a change of theirs is to be noticed."""
    files = Path(folder).rglob("*")
    return sorted(str(file) for file in files if file.is_file() and "__pycache__" not in file.parts)


class Files:
    """The files of one study (a settings.Study) that its jobs rest on, by the names of models and data sets."""

    def __init__(self, study):
        self.study, self.resources = study, study.resources

    def dataset(self, name):
        """The record of a prepared data set: generated ones share one folder, others have their own."""
        entry = self.study.dataset(name)
        if entry and entry["source"]["kind"] == "miniature":
            return self._generated(entry["source"]["path"])
        return f"{self.resources}/datasets/{name}/dataset.json"

    def datasets(self, names):
        """The records of several data sets."""
        return [self.dataset(name) for name in names]

    def dataset_sources(self, name):
        """The files that a local data set is read from; of a task that brings its own data, those that say which."""
        entry = self.study.dataset(name)
        if entry is None:
            # not the code that a task calls: it judges answers, and data that is here must not ask for the hub again
            files = self.task_definitions() if self.study.defines(name) else []
            return [file for file in files if not file.endswith(".py")]
        return local_files(entry["source"], entry["splits"].values())

    def by_name(self, names):
        """name -> record of several data sets."""
        return {name: self.dataset(name) for name in names}

    def model(self, name):
        """The record of a dense model's folder."""
        source = self.study.models[name]["source"]
        if source["kind"] == "miniature":
            return self._miniature(source["path"])
        return f"{self.resources}/models/{name}/model.json"

    def _miniature(self, name):
        return f"{self.resources}/miniature/models/{name}/model.json"

    @functools.cached_property
    def configurations(self):
        """model -> the configuration of each active model that is not made here: known before its weights are."""
        return {
            model: config_file(self.study, model)
            for model in self.study.active_models()
            if self.study.models[model]["source"]["kind"] != "miniature"
        }

    def fetched_configurations(self):
        """Those of them that have to be fetched, where a grid is checked against them."""
        if self.study.config["candidates"]["table"] is not None:
            return []
        every = self.configurations.items()
        return [path for model, path in every if self.study.models[model]["source"]["kind"] == "hub"]

    def task_definitions(self):
        """The files of the user's own task definitions: a change of theirs is to be noticed."""
        place = self.study.evaluate["zero_shot"]["include_path"]
        return definition_files(place) if place else []

    def miniature_corpus(self):
        """The records of the text that the miniature models are trained on."""
        corpus = self.study.miniature["corpus"]
        if corpus != "world":
            return [self.dataset(corpus)]
        return [self._generated(name) for name in ("pretraining", "wikitext2", "ptb")]

    def miniature_parents(self, name):
        """What a miniature model is built from beside the corpus: an instruct one from its base and instructions."""
        if not name.endswith("-instruct"):
            return []
        instructions = self.dataset("alpaca") if self.study.dataset("alpaca") else self._generated("alpaca")
        return [self._miniature(name.removesuffix("-instruct")), instructions]

    def _generated(self, name):
        return f"{self.resources}/miniature/{name}/dataset.json"
