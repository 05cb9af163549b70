"""A change of report or selection rows prunes nothing again; a change of what a candidate is made from does."""

import json
import os

import pytest

from coppice.core import fingerprints, records
from coppice.study import settings

from .changes import Finished

pytestmark = pytest.mark.guard

STUDY = {
    "models": {"Hub": {"base": "org/model", "revision": "abc", "family": "llama", "parameters": 1000000}},
    "candidates": {"prune": [{"method": "depth", "ratio": 0.34}]},
    "finetune": {"data": {"dataset": "alpaca"}},
    "evaluate": {"perplexity": {"datasets": ["wikitext2"]}, "zero_shot": {"tasks": ["piqa"]}},
    "datasets": {
        "wikitext2": {"path": "text", "format": "text"},
        "alpaca": {"path": "miniature/alpaca"},
        "piqa": {"path": "miniature/piqa"},
    },
}
CHOSEN = {"best_acc": "depth-0.34", "best_ppl": "depth-0.34"}
OTHER_REPORT = {"datasets": {"wikitext2": {"splits": {"report": "other"}}}}


@pytest.fixture(scope="module")
def finished(new_checkout):
    folder = new_checkout("calibrated").folder
    (folder / "config/config.yaml").write_text(json.dumps(STUDY))
    (folder / "text").mkdir()
    for split in ("train", "validation", "test", "other"):
        (folder / f"text/{split}.txt").write_text(split)
    study = Finished(folder, CHOSEN)
    record = "resources/datasets/wikitext2/dataset.json"
    source = {"path": str(folder / "text"), "name": None, "revision": None, "commit": None, "format": "text"}
    _replace(
        folder / record,
        {
            "source": source | {"columns": {}},
            "roles": {"train": {"fingerprint": "rows"}},
            "provenance": {
                "settings": {"splits": {"train": "train", "selection": "validation", "report": "test"}},
                "fingerprints": {"files": {"train.txt": fingerprints.content_digest(folder / "text/train.txt")}},
            },
        },
    )
    configured = settings.load(STUDY, workdir=folder)
    point = configured.candidates("Hub")["depth-0.34"]
    made = {
        "source": {"path": "-", "dtype": None, "quantize": None, "trust_remote_code": False, "device_map": None},
        "point": point,
        "calibration": configured.calibration_of("Hub").model_dump() | {"record": record},
        "seed": 42,
    }
    facts = {"recipe": made, "provenance": {"fingerprints": {"calibration": "rows"}}, "weights_fingerprint": ""}
    _replace(folder / "results/candidates/Hub/depth-0.34/pruning.json", facts)
    assert not study.reruns({})
    return study


def _replace(path, content):
    """Write a record in the place of a stand-in file, with that file's time."""
    time = path.stat().st_mtime_ns
    records.write(path, content)
    os.utime(path, ns=(time, time))


def test_other_report_rows_prune_nothing_again(finished):
    again = finished.reruns(OTHER_REPORT)
    assert "fetch_dataset" in again and "evaluate_dense" in again
    assert "prune_candidate" not in again


def test_other_train_rows_prune_again(finished):
    assert "prune_candidate" in finished.reruns({"datasets": {"wikitext2": {"splits": {"train": "other"}}}})


@pytest.mark.parametrize("change", [{"candidates": {"calibration": {"samples": 64}}}, {"seed": 7}])
def test_a_new_setting_prunes_again_even_if_the_report_rows_change_in_the_same_run(finished, change):
    assert "prune_candidate" in finished.reruns(change)
    assert "prune_candidate" in finished.reruns(OTHER_REPORT | change)


def test_an_edited_train_file_prunes_again(finished):
    file = finished.folder / "text/train.txt"
    file.write_text("another text")
    assert "prune_candidate" in finished.reruns({})


def test_rows_that_a_stopped_run_fetched_prune_again(finished):
    """The record of the data is new then, and agrees with the settings, but the candidate is older."""
    pruning = finished.folder / "results/candidates/Hub/depth-0.34/pruning.json"
    (finished.folder / "text/train.txt").write_text("train")
    facts = records.read(pruning)
    _replace(pruning, facts | {"provenance": {"fingerprints": {"calibration": "other rows"}}})
    os.utime(finished.folder / "resources/datasets/wikitext2/dataset.json")
    assert "prune_candidate" in finished.reruns({})
