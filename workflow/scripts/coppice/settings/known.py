"""What is known by name without configuration: official data sets, the seven tasks, the miniatures, lm-eval's tasks."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

FAMILIES = ("llama", "qwen", "mistral")
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
MINIATURE_MODELS = tuple(family + suffix for family in FAMILIES for suffix in ("", "-instruct"))

_TESTED = {"train": "train", "selection": "validation", "report": "test"}
# Their test labels are not public, so the literature reports on validation; candidates are scored on a sample of train.
_VALIDATED = {"train": "train", "selection": None, "report": "validation"}

# Ids that load without a loading script.
DATASETS = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "splits": _TESTED},
    "ptb": {
        "path": "ptb-text-only/ptb_text_only",
        "revision": "refs/convert/parquet",
        "columns": {"text": "sentence"},
        "splits": _TESTED,
    },
    "alpaca": {"path": "yahma/alpaca-cleaned", "splits": {"train": "train", "selection": None, "report": None}},
    "boolq": {"path": "aps/super_glue", "name": "boolq", "splits": _VALIDATED},
    "piqa": {"path": "baber/piqa", "splits": _VALIDATED},
    "hellaswag": {"path": "Rowan/hellaswag", "splits": _VALIDATED},
    "winogrande": {"path": "allenai/winogrande", "name": "winogrande_xl", "splits": _VALIDATED},
    "arc_easy": {"path": "allenai/ai2_arc", "name": "ARC-Easy", "splits": _TESTED},
    "arc_challenge": {"path": "allenai/ai2_arc", "name": "ARC-Challenge", "splits": _TESTED},
    "openbookqa": {"path": "allenai/openbookqa", "name": "main", "splits": _TESTED},
}


def with_official(name, entry):
    """The configured `entry` of data set `name`, completed with what is known of it; `entry` has no defaults yet."""
    official = DATASETS.get(name, {})
    if entry.get("path") not in (None, official.get("path")):
        # somebody else's copy: only the habit of which split serves what carries over
        official = {} if entry["path"].startswith("miniature/") and name != "alpaca" else official
        official = {"splits": official.get("splits", {})}
    merged = {**official, **entry}
    merged["splits"] = {**official.get("splits", {}), **entry.get("splits", {})}
    return merged


@cache
def harness_tasks():
    """Names of all lm-eval tasks, from its files without importing it (seconds); empty where it is not installed."""
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    pattern = re.compile(r"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#\[\]]+)""", re.MULTILINE)
    names = set()
    for file in (Path(found.submodule_search_locations[0]) / "tasks").rglob("*.yaml"):
        names.update(pattern.findall(file.read_text(encoding="utf-8", errors="replace")))
    return frozenset(names)
