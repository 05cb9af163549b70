"""Names that need no configuration: official data sets, the seven default tasks, the miniatures, lm-eval's tasks."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from coppice.core.aliases import PathLike, Record

FAMILIES = ("llama", "qwen", "mistral")


class Miniature(NamedTuple):
    """What a miniature model is, by the names of the keys under `models`."""

    family: str
    variant: str = "base"
    kind: str = "causal-lm"


OTHER_MINIATURES = {
    "t5": Miniature("t5", kind="seq2seq"),
    "qwen3-vl": Miniature("qwen3-vl", variant="instruct", kind="image-text"),
    "clip": Miniature("clip", kind="dual-encoder"),
    "code": Miniature("code"),
}
MINIATURE_MODELS = {
    family + suffix: Miniature(family, variant)
    for family in FAMILIES
    for suffix, variant in (("", "base"), ("-instruct", "instruct"))
} | OTHER_MINIATURES
# Files of the seven default tasks in lm-eval's folder; searching all 14,000 definitions takes a second
OFFICIAL = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
TASKS = tuple(OFFICIAL)

# Perplexity protocols that need no definition in the configuration
PROTOCOLS = ("gptq-2048", "llmpruner-128", "shortened-llm-128", "gptq-2048-v1", "llmpruner-128-v1")
# protocol -> text -> role whose rows the protocol reads, if that is not "report"
PROTOCOL_ROLES = {name: {"ptb": "selection"} for name in ("llmpruner-128", "shortened-llm-128", "llmpruner-128-v1")}
# Protocols whose windows all begin with BOS, so that a tokenizer without BOS cannot serve them
PROTOCOLS_WITH_BOS = ("shortened-llm-128",)

_SCALAR = r"""[ \t]*:[ \t]*["']?([^\s"'#\[\]]+)"""
_TASK = re.compile(rf"""^["']?task["']?{_SCALAR}""", re.MULTILINE)
_GROUP = re.compile(rf"^(?:group|tag){_SCALAR}", re.MULTILINE)
_TAGS = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[ \t]*[^\s#]+[ \t]*\n)+)", re.MULTILINE)

_TESTED = {"train": "train", "selection": "validation", "report": "test"}
# The test labels of these tasks are not public, so the literature reports on validation. Selection is None: candidates
# are scored on a sample of train.
_VALIDATED = {"train": "train", "selection": None, "report": "validation"}
_TRAIN_ONLY = {"train": "train", "selection": None, "report": None}
_BY_ROLE = {"train": "train", "selection": "selection", "report": "report"}

# Ids of data sets that load without a loading script. Those of the tasks are in lm-eval's definitions.
DATASETS = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "splits": _TESTED},
    "ptb": {
        "path": "ptb-text-only/ptb_text_only",
        "revision": "refs/convert/parquet",
        "columns": {"text": "sentence"},
        "splits": _TESTED,
    },
    # The first of 1024 files, as GPTQ, SparseGPT and Wanda have it
    "c4": {
        "path": "allenai/c4",
        "splits": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "selection": None,
            "report": "en/c4-validation.00000-of-00008.json.gz",
        },
    },
    # The sentences of books, of which a hundredth is enough for calibration
    "bookcorpus": {
        "path": "bookcorpus/bookcorpus",
        "revision": "refs/convert/parquet",
        "splits": {"train": "train[:1%]", "selection": None, "report": None},
    },
    "alpaca": {"path": "yahma/alpaca-cleaned", "splits": _TRAIN_ONLY},
}
PICTURE_DATASETS = (
    *("captions", "picture-texts", "picture-captions", "picture-questions"),
    *("picture-pairs", "picture-classes"),
)
CODE_DATASETS = ("code", "code-files")
MINIATURE_DATASETS = ("wikitext2", "ptb", "alpaca", *TASKS, *PICTURE_DATASETS, *CODE_DATASETS)
# Data sets of text whose rows are documents of their own
DOCUMENTS = ("c4",)


def completed(name: str, entry: Record) -> Record:
    """Return the configured `entry` of a data set, completed from the official data set of that name.

    The entry holds only the keys that are given, so that the official values win over defaults.
    """
    official, path = DATASETS.get(name, {}), entry.get("path")
    splits = _VALIDATED if name in ("boolq", "piqa", "hellaswag", "winogrande") else official.get("splits", {})
    if path is not None and path.startswith("miniature/"):
        of = path.removeprefix("miniature/")
        defaults = {key: value for key, value in DATASETS.get(of, {}).items() if key == "columns"}
        splits = _TRAIN_ONLY if of == "alpaca" else _BY_ROLE
    else:
        # A copy in another place may have other columns and configurations; only the usual roles of its splits apply
        defaults = official if path in (None, official.get("path")) else {}
    return {**defaults, **entry, "splits": {**splits, **entry.get("splits", {})}}


class Tasks(NamedTuple):
    """The content of a folder of lm-eval definitions.

    Attributes:
        files: task -> its YAML file.
        groups: the names of groups and tags.
    """

    files: dict[str, Path]
    groups: frozenset[str]


def harness_folder() -> Path | None:
    """Return the folder of lm-eval's own task definitions; None if lm-eval is not installed."""
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "tasks"


@cache
def tasks_in(folder: PathLike) -> Tasks:
    """Return the `Tasks` under `folder`. The files are read as text, because importing lm-eval's index takes 8 s."""
    files, groups = {}, set()
    for file in sorted(Path(folder).rglob("*.yaml"), key=lambda path: path.as_posix()):
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for name in _TASK.findall(text):
            files.setdefault(name, file)
        groups.update(_GROUP.findall(text))
        for tags in _TAGS.findall(text):
            groups.update(line.strip().lstrip("- ") for line in tags.splitlines())
    return Tasks(files, frozenset(groups) - files.keys())


def definition_file(task: str) -> Path | None:
    """Return the YAML file of one of lm-eval's own tasks; None if there is none."""
    folder = harness_folder()
    if folder and task in OFFICIAL:
        return folder / OFFICIAL[task]
    return harness_tasks().files.get(task)


@cache
def harness_tasks() -> Tasks:
    """Return the `Tasks` of lm-eval itself; empty if it is not installed."""
    folder = harness_folder()
    return tasks_in(folder) if folder else Tasks({}, frozenset())
