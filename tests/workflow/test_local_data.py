"""The workflow on real data in local files: WikiText-2, PTB, alpaca-cleaned and real rows of the seven tasks.

The environment variable COPPICE_REALDATA names the folder (default: shared/realdata beside the checkout). The tests
are skipped if it does not exist.
"""

import json
import os
from pathlib import Path

import pytest

REALDATA = Path(os.environ.get("COPPICE_REALDATA", Path(__file__).parents[3] / "shared/realdata"))
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REALDATA.is_dir(), reason=f"no real data at {REALDATA} (set COPPICE_REALDATA)"),
]

QUICK = {
    "data_root": str(REALDATA),
    "only": "{models: [Mistral], configs: [best_acc]}",
    "miniature": "{steps: 60}",
    "finetune": "{max_steps: 4, eval_steps: 2, save_steps: 2, warmup_steps: 1, data: {val_size: 50}}",
    "evaluate": "{zero_shot: {limit: 20}}",
    "candidates": "{prune: [{method: depth, ratio: 0.34}]}",
}


@pytest.fixture(scope="module")
def study(new_checkout):
    checkout = new_checkout("local")
    checkout.run("--cores", "2", "--configfile", "config/local_data.yaml", config=QUICK)
    return checkout


def test_writes_a_comparison_report(study):
    report = study.folder / "results-local/finetuned_evaluation/Mistral/best_acc_finetuned/comparison_report.txt"
    assert all(task in report.read_text() for task in TASKS)


def test_evaluates_the_official_tasks_on_the_local_rows(study):
    record = json.loads((study.folder / "results-local/dense_evaluation/Mistral/evaluation_results.json").read_text())
    assert {name: result["version"] for name, result in record["zero_shot"].items()} == {
        task: 2.0 if task == "boolq" else 1.0 for task in TASKS
    }
    assert record["perplexity"]["wikitext2"]["protocol"]["split"] == "test"


def test_reports_exclude_the_items_that_candidates_were_chosen_on(study):
    record = json.loads((study.folder / "resources-local/datasets/piqa/dataset.json").read_text())
    rows = {role: facts["rows"] for role, facts in record["roles"].items()}
    assert rows["report"] + rows["selection"] == 500 and "leave out" in record["notes"][0]


def test_names_a_missing_data_folder(new_checkout):
    done = new_checkout("nowhere").snakemake(
        "-n", "--configfile", "config/local_data.yaml", config={"data_root": "/nowhere"}
    )
    assert done.returncode == 1 and "data_root" in done.stdout and "/nowhere" in done.stdout
