"""The study of several kinds of model, cut down: a captioner and a dual encoder go through every stage together."""

import json

import pytest

from tests.study.checkout import planned_jobs

pytestmark = pytest.mark.guard
FILE = ("--configfile", "config/kinds.yaml")
# Few steps: the models stay bad, but every stage runs
QUICK = {
    "only": "{models: [Captioner, Searcher]}",
    "miniature": "{steps: 20}",
    "finetune": "{max_steps: 4, eval_steps: 2, save_steps: 2, warmup_steps: 1, data: {val_size: 20}}",
    "models": json.dumps(
        {
            "Captioner": {"evaluate": {"answers": {"limit": 20, "new_tokens": 8}}},
            "Searcher": {"finetune": {"max_steps": 4, "batch_size": 16, "micro_batch_size": 8}},
        }
    ),
}
REPORT = "results-kinds/finetuned_evaluation/{}/best_score_finetuned/comparison.json"


@pytest.fixture(scope="module")
def study(new_checkout):
    checkout = new_checkout("kinds")
    checkout.run("--cores", "2", *FILE, config=QUICK)
    return checkout


def record(study, model, stage="dense"):
    (path,) = (study.folder / f"results-kinds/{stage}_evaluation/{model}").rglob("evaluation_results.json")
    return json.loads(path.read_text())


def test_each_model_is_measured_by_what_its_kind_can_do(study):
    captioner, searcher = record(study, "Captioner"), record(study, "Searcher")
    assert 0 <= captioner["bleu4"]["captions"]["value"] <= 1 and captioner["bleu4"]["captions"]["n"] == 20
    assert "bleu4" not in searcher and "text_to_image_r1" not in captioner
    assert searcher["text_to_image_r1"]["picture-pairs"]["n"] == 600  # two captions a picture
    assert 0 <= searcher["top1"]["picture-classes"]["value"] <= 1


def test_each_model_is_compared_by_its_own_criterion(study):
    chosen = {
        model: json.loads(
            (study.folder / f"results-kinds/for_finetuning/{model}/best_score/selection_info.json").read_text()
        )
        for model in ("Captioner", "Searcher")
    }
    assert chosen["Captioner"]["criterion"]["metric"] == "bleu4.captions"
    assert chosen["Searcher"]["criterion"]["metric"] == "text_to_image_r1.picture-pairs"
    for model in chosen:
        assert json.loads((study.folder / REPORT.format(model)).read_text())["model"] == model


def test_the_report_has_both_kinds(study):
    page = (study.folder / "results-kinds/report/study_report.html").read_text()
    assert all(word in page for word in ("Captioner", "Searcher", "BLEU-4"))


def test_the_adapters_load_with_plain_peft(study):
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    for model, auto in (("Captioner", AutoModelForSeq2SeqLM), ("Searcher", AutoModel)):
        base = auto.from_pretrained(study.folder / f"results-kinds/for_finetuning/{model}/best_score")
        adapted = PeftModel.from_pretrained(
            base, study.folder / f"results-kinds/finetuned/{model}/best_score_finetuned"
        )
        assert any(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)


def test_a_second_run_has_nothing_to_do(study):
    assert "Nothing to be done" in study.run("--cores", "1", *FILE, config=QUICK).stdout


def test_one_more_step_of_training_reruns_nothing_before_it(study):
    longer = QUICK | {"finetune": QUICK["finetune"].replace("max_steps: 4", "max_steps: 6")}
    jobs = planned_jobs(study.run("-n", *FILE, config=longer))
    assert jobs["finetune_lora"] == 1  # the dual encoder has a training length of its own
    assert not {"prune_candidate", "score_candidate", "evaluate_dense", "build_miniature_kind"} & set(jobs)
