"""The default study, run by the README's own command, writes its reports with meaningful numbers.

`make test-all` sets COPPICE_TEST_ALL_MODELS and runs all six models. Otherwise one of each family runs, of both
variants, in about half the time. The thresholds are loose on purpose: they detect a broken miniature world, not a
difference between machines.
"""

import json
import math
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.guard
SIX = ("Llama", "Llama-Instruct", "Qwen", "Qwen-Instruct", "Mistral", "Mistral-Instruct")
MODELS = SIX if "COPPICE_TEST_ALL_MODELS" in os.environ else ("Llama", "Qwen-Instruct", "Mistral")
CONFIG = {} if MODELS == SIX else {"only": f"{{models: [{', '.join(MODELS)}]}}"}
CHANCE = math.fsum((0.5, 0.5, 0.25, 0.5, 0.25, 0.25, 0.25)) / 7


@pytest.fixture(scope="module")
def study(new_checkout):
    checkout = new_checkout("miniature")
    checkout.run("--cores", "8", "--resources", "gpu=2", config=CONFIG, timeout=3000)
    return checkout


@pytest.fixture(scope="module")
def comparisons(study):
    paths = (study.folder / "results").glob("finetuned_evaluation/*/*/comparison.json")
    return [json.loads(path.read_text()) for path in paths]


def test_writes_a_comparison_report_for_each_model_and_criterion_and_a_study_report(study, comparisons):
    reports = list((study.folder / "results").glob("finetuned_evaluation/*/*_finetuned/comparison_report.txt"))
    assert len(reports) == len(comparisons) == 2 * len(MODELS)
    assert {record["model"] for record in comparisons} == set(MODELS)
    page = (study.folder / "results/report/study_report.html").read_text()
    assert all(model in page for model in MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_dense_models_are_far_above_chance(study, model):
    record = json.loads((study.folder / f"results/dense_evaluation/{model}/evaluation_results.json").read_text())
    assert record["average_acc"] > CHANCE + 0.25


def test_pruning_costs_some_candidate_much_accuracy(study):
    dense = {m: accuracy(study, f"results/dense_evaluation/{m}/evaluation_results.json") for m in MODELS}
    losses = [
        dense[path.parts[-3]] - json.loads(path.read_text())["average_acc"]
        for path in (study.folder / "results/candidate_evaluation").glob("*/*/evaluation_results.json")
    ]
    assert max(losses) > 0.10


def test_finetuning_improves_most_candidates(comparisons):
    better = [record["perplexity"]["wikitext2"]["change"]["value"] < 0 for record in comparisons]
    gained = [record["average_acc"]["change"]["value"] > 0 for record in comparisons]
    assert min(sum(better), sum(gained)) > len(comparisons) / 2


def test_a_second_run_has_nothing_to_do(study):
    assert "Nothing to be done" in study.run("--cores", "8", "--resources", "gpu=2", config=CONFIG).stdout


def test_rebuilds_one_report_by_its_path_alone(study):
    target = "results/finetuned_evaluation/Llama/best_acc_finetuned/comparison_report.txt"
    (study.folder / target).unlink()
    done = study.run(target, config=CONFIG)
    assert (study.folder / target).exists() and "1 of 1 steps" in done.stdout


def test_no_record_contains_a_path_of_the_home_folder(study):
    for path in (study.folder / "results").rglob("*.json"):
        assert str(Path.home()) not in path.read_text()


def accuracy(study, path):
    return json.loads((study.folder / path).read_text())["average_acc"]
