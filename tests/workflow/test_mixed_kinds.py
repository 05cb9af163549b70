"""A study of several kinds of model: a model's own sections and data concern its own jobs alone."""

import copy

import pytest

from .changes import Finished

pytestmark = pytest.mark.guard

STUDY = """
models:
  Llama: {base: miniature/llama}
  Captioner:
    base: miniature/t5
    prune: [{method: depth, ratio: 0.34, tower: encoder, name: small}]
    finetune: {data: {dataset: captions}}
    evaluate: {answers: {datasets: [captions]}}
candidates:
  prune: [{method: width, ratio: 0.5, importance: magnitude, name: small}]
select:
  configs:
    best_acc: {metric: average_acc}
    best_ppl: {metric: [ppl.wikitext2, answer_ppl.captions, image_to_text_r1.pairs]}
finetune: {max_steps: 200, data: {dataset: alpaca}}
evaluate: {perplexity: {datasets: [wikitext2]}, zero_shot: {tasks: [piqa]}}
datasets:
  wikitext2: {path: miniature/wikitext2}
  alpaca: {path: miniature/alpaca}
  piqa: {path: miniature/piqa}
  captions: {path: miniature/captions}
  pairs: {path: miniature/picture-pairs}
ablations:
  adapters: {start: {model: Captioner, config: best_ppl}, arms: [light, full], budget: {max_steps: 200}}
"""
ANOTHER = {
    "models": {
        "Pictures": {
            "base": "miniature/clip",
            "finetune": {"data": {"dataset": "pairs"}},
            "evaluate": {"retrieval": {"datasets": ["pairs"]}},
        }
    },
}
OF_ALL_MODELS = {"summarize_selection", "write_report"}


@pytest.fixture(scope="module")
def finished(new_checkout):
    folder = new_checkout("mixed").folder
    (folder / "config/config.yaml").write_text(STUDY)
    return Finished(folder, {"best_acc": "small", "best_ppl": "small"})


def of_models(finished, changes):
    """Return {rule: the models, or ablations, of its finished jobs that `changes` make run again}."""
    found = {}
    for rule, named in finished.named(changes):
        found.setdefault(rule, set()).add(named)
    return {rule: names for rule, names in found.items() if rule not in OF_ALL_MODELS}


def test_a_criterion_without_a_metric_of_the_model_makes_no_job(finished):
    made = {
        path.relative_to(finished.folder / "results").as_posix() for path in finished.folder.rglob("comparison.json")
    }
    assert made == {
        "finetuned_evaluation/Llama/best_acc_finetuned/comparison.json",
        "finetuned_evaluation/Llama/best_ppl_finetuned/comparison.json",
        "finetuned_evaluation/Captioner/best_ppl_finetuned/comparison.json",
    }


def test_another_model_with_other_data_reruns_no_job_of_the_others(finished):
    assert set(of_models(finished, copy.deepcopy(ANOTHER))) == set()
    assert finished.added(copy.deepcopy(ANOTHER))["evaluate_finetuned"] == 0  # known once the config has chosen
    assert finished.added(copy.deepcopy(ANOTHER))["evaluate_dense"] == 1


@pytest.mark.parametrize(
    ("own", "first"),
    [
        ({"finetune": {"learning_rate": 0.002}}, {"finetune_lora"}),
        ({"evaluate": {"answers": {"beams": 4}}}, {"evaluate_dense", "score_candidate"}),
        ({"calibration": {"samples": 8}}, {"prune_candidate"}),
    ],
)
def test_a_key_of_a_model_reruns_jobs_of_this_model_alone(finished, own, first):
    found = of_models(finished, {"models": {"Captioner": own}})
    assert first <= set(found) and set().union(*found.values()) <= {"Captioner", "adapters"}


def test_sections_of_the_study_do_not_reach_a_model_that_sets_the_key_itself(finished):
    found = of_models(finished, {"finetune": {"data": {"dataset": "captions"}}})
    assert set().union(*found.values()) == {"Llama"}
