"""The registry of metrics: their names, their places in records, and a further metric in every stage."""

import dataclasses

import numpy
import pandas
import pytest
from synthetic_records import SIX, Synthetic

from coppice.core import fingerprints, records
from coppice.report import study_report
from coppice.report.study_report import answers, measurements, study_records
from coppice.stages.select import margins, ranking
from coppice.stats import metrics

BLEU = metrics.Metric(
    key="bleu.{}",
    section="captions",
    label="BLEU on {}",
    kind="BLEU",
    column="BLEU",
    scale=100,
    digits=1,
    low=0,
    high=1,
    values="bleu",
    facts=("n",),
)
PAIR = ("Llama", "best_acc")


def test_a_key_names_its_metric():
    assert metrics.named("average_acc") == metrics.AVERAGE == metrics.named("acc")
    assert metrics.named("ppl.ptb") == metrics.PERPLEXITY.on("ptb")
    assert metrics.named("validation_loss") == metrics.LOSS
    assert metrics.named("boolq") == metrics.TASK.on("boolq")
    assert [one.key for one in metrics.axes_of(["model", "ppl", "ppl.ptb", "mine"])] == ["average_acc", "ppl.ptb"]
    assert metrics.axes_of(["average_acc", "ppl"])[1].key == "ppl"


def test_finds_the_metrics_in_a_record_with_their_values():
    tasks = {"piqa": {"value": 0.5}, "boolq": {"value": 0.7}}
    record = {"zero_shot": tasks, "perplexity": {"ptb": {"value": 9.0}}, "average_acc": 0.6}
    found = {metric.key: metric.value(record) for metric in metrics.found_in(record)}
    assert found == {"average_acc": 0.6, "piqa": 0.5, "boolq": 0.7, "ppl.ptb": 9.0}
    assert metrics.found_in({"zero_shot": {}, "perplexity": {}, "average_acc": None}) == []
    mean = metrics.found_in(record)[0]
    assert metrics.parts_of(mean) == [metrics.TASK.on("piqa"), metrics.TASK.on("boolq")]


def test_answers_lead_in_the_order_of_the_settings_and_pair_with_a_metric_of_the_other_direction():
    captions = {"bleu4": {"d": {}}, "cider": {"d": {}}, "exact_match": {"d": {}}, "answer_ppl": {"d": {}}}
    assert [one.key for one in metrics.axes(metrics.found_in(captions))] == ["bleu4.d", "answer_ppl.d"]
    code = {"answer_ppl": {"d": {}}, "exact_match": {"d": {}}, "bleu4": {"d": {}}, "perplexity": {"t": {}}}
    assert [one.section for one in metrics.held_by(code)] == ["exact_match", "bleu4", "answer_ppl", "perplexity"]
    assert [one.key for one in metrics.axes(metrics.found_in(code))] == ["exact_match.d", "answer_ppl.d"]
    assert next(iter(metrics.held_by(code | {"pass_at_1": {"d": {}}}))).section == "pass_at_1"
    dual = {"image_to_text_r1": {"d": {}}, "image_to_text_r5": {"d": {}}, "text_to_image_r1": {"d": {}}}
    assert [one.key for one in metrics.axes(metrics.found_in(dual))] == ["image_to_text_r1.d", "text_to_image_r1.d"]


def test_settings_name_the_metrics_that_an_evaluation_measures():
    from coppice.study.settings.sections.evaluate import Evaluate

    nothing = {"perplexity": {"datasets": []}, "zero_shot": {"tasks": []}}
    asked = Evaluate(**nothing, answers={"datasets": ["d"], "metrics": ["anls", "bleu4"]})
    assert {one.key for one in metrics.asked_in(asked)} == {"bleu4.d", "anls.d", "answer_ppl.d"}
    asked = Evaluate(**nothing, answers={"datasets": ["d"], "metrics": ["anls"], "programs": {"run": True}})
    assert {one.key for one in metrics.asked_in(asked)} == {"pass_at_1.d", "anls.d", "answer_ppl.d"}
    asked = Evaluate(**nothing, retrieval={"datasets": ["p"]}, classification={"datasets": ["c"]})
    keys = [one.key for one in metrics.asked_in(asked)]
    assert keys[:3] == ["image_to_text_r1.p", "text_to_image_r1.p", "top1.c"] and len(keys) == 8


class Captioned(Synthetic):
    """A study whose evaluations also hold the BLEU of captions, with one score for each row."""

    def _evaluation(self, folder, identity, skill):
        super()._evaluation(folder, identity, skill)
        scores = numpy.clip(0.4 * skill + self.random.normal(0, 0.05, self.items), 0, 1)
        rows = {"doc_id": range(self.items), "doc_hash": [f"coco-{i}" for i in range(self.items)], "bleu": scores}
        pandas.DataFrame(rows).to_parquet(folder / "samples/coco.parquet", index=False)
        path = folder / "evaluation_results.json"
        record = records.read(path)
        record["samples"]["coco"] = fingerprints.content_digest(folder / "samples/coco.parquet")
        records.write(path, record | {"captions": {"coco": {"value": float(scores.mean()), "n": self.items}}})


@pytest.fixture
def captioned(monkeypatch, tmp_path):
    """Return a study with a further metric, of which only the registry and the evaluator know."""
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, BLEU))
    return Captioned(tmp_path, {"Llama": SIX["Llama"], "Qwen": SIX["Qwen"]}, items=60, windows=25).build()


def test_compares_and_reports_a_further_metric(captioned, monkeypatch):
    from coppice.report.study_report import figures

    monkeypatch.setattr(figures, "draw", lambda study, frames, folder: [])
    folder = captioned.folder("finetuned", *PAIR)
    scores = [
        pandas.read_parquet(captioned.folder(stage, *PAIR) / "samples/coco.parquet")["bleu"].mean()
        for stage in ("dense", "pruned", "finetuned")
    ]
    part = records.read(folder / "comparison.json")["captions"]["coco"]
    assert part["n"] == 60 and part["verdict"] == "better"
    assert [part[stage] for stage in ("dense", "pruned", "finetuned")] == pytest.approx(scores)
    assert part["recovered"]["value"] == pytest.approx((scores[2] - scores[1]) / (scores[0] - scores[1]))
    text = (folder / "comparison_report.txt").read_text()
    assert "BLEU (higher is better)" in text and f"{100 * scores[2]:.1f}" in text
    study_report.write_report(captioned.results, captioned.pairs, captioned.models, captioned.results / "report")
    page = (captioned.results / "report/study_report.md").read_text()
    assert "BLEU on coco, recovered" in page and "the recovered share of BLEU is" in page
    frame = pandas.read_csv(captioned.results / "report/comparisons.csv").set_index(["model", "config"])
    assert frame.loc[PAIR, "bleu.coco_finetuned"] == pytest.approx(scores[2])


def test_a_further_metric_can_answer_the_questions(captioned, monkeypatch):
    leading = dataclasses.replace(BLEU, answers=True)
    entries = [dataclasses.replace(entry, answers=False) for entry in metrics.METRICS if entry.key != BLEU.key]
    monkeypatch.setattr(metrics, "METRICS", (*entries, leading))
    study = study_records.read(captioned.results, captioned.pairs, captioned.models)
    found = {answer.key: answer for answer in answers.answers(study, measurements.gather(study))}
    assert found["recovery"].sentence.endswith("of the BLEU on coco that pruning lost.")
    # the other metric is the first of the other direction
    assert found["tradeoff"].question == "How does the trade-off between BLEU and perplexity move?"


def test_selects_by_a_further_metric(captioned):
    folders = [captioned.folder("pruned", "Llama", config) for config in captioned.configs]
    evaluations = [records.read(folder / "evaluation_results.json") for folder in folders]
    scored = [
        {
            "evaluation": folder,
            "measured": {metric.key: metric for metric in metrics.found_in(evaluation)},
            "metrics": ranking.metrics_of(evaluation),
            "parameters": 1,
            "given": {},
        }
        for folder, evaluation in zip(folders, evaluations, strict=True)
    ]
    criterion = {"metric": "bleu.coco", "mode": "max", "pareto": None}
    (best, first), (_, second) = ranking.rank(dict(zip("ab", scored, strict=True)), criterion)
    assert best == "a" and first > second
    low, high = margins.of(*scored, "bleu.coco")["interval"]
    assert low < second - first < high < 0
