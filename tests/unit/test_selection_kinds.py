"""Selection among candidates that are measured by other metrics than accuracy and perplexity."""

import pandas
import pytest
from synthetic_kinds import mixed

from coppice.core import records
from coppice.stages.select import choice, summary

POINT = {"method": "width", "ratio": 0.25, "importance": "taylor", "parts": ["mlp"]}


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """Return model -> candidate -> (pruning.json, evaluation), of a language model, a captioner and a dual encoder."""
    folder = tmp_path_factory.mktemp("study")
    study = mixed(folder / "results", items=80, Llama=None, Cap="captioner", Clip="dual").build()
    found = {}
    for model in study.models:
        found[model] = {}
        for name, config in (("good", "best_acc"), ("poor", "best_ppl")):
            path = folder / "candidates" / model / name / "pruning.json"
            facts = {"settings": POINT, "weights_fingerprint": f"{model} {name}", "parameters": {"after": 760_000}}
            records.write(path, facts)
            found[model][name] = (path, study.folder("pruned", model, config) / "evaluation_results.json")
    return folder, found


def by(**parts):
    given = {"metric": None, "mode": None, "pareto": None, "metrics": None, "where": {}, "split": "selection"}
    return given | parts | {"words": "by a metric"}


def select(candidates, model, criterion):
    folder, found = candidates
    output = folder / "chosen" / model
    choice.select_best({"model": model, "config": "best"}, criterion, found[model], output)
    return records.read(output / "selection_info.json")


@pytest.mark.parametrize(
    ("model", "metric", "mode"),
    [
        ("Cap", "bleu4.captions", "max"),
        ("Cap", "answer_ppl.captions", "min"),
        ("Clip", "image_to_text_r5.pairs", "max"),
        ("Clip", "top1.classes", "max"),
    ],
)
def test_chooses_by_any_metric_with_an_interval_of_the_margin(candidates, model, metric, mode):
    info = select(candidates, model, by(metric=metric, mode=mode))
    second = info["runner_up"]
    values = [records.read(path)[metric.split(".")[0]] for _, path in candidates[1][model].values()]
    good, poor = (next(iter(one.values()))["value"] for one in values)
    assert info["candidate"] == "good" and info["value"] == pytest.approx(good)
    assert second["margin"] == pytest.approx(abs(good - poor))
    low, high = second["interval"]
    assert low < poor - good < high and second["resampled"]["count"] == 80


def test_the_knee_of_two_metrics_of_one_direction_is_on_their_front(candidates):
    both = {"image_to_text_r1.pairs": "max", "top1.classes": "max"}
    assert select(candidates, "Clip", by(pareto="knee", metrics=both))["candidate"] == "good"


def test_the_summary_shows_each_model_by_its_own_metrics(candidates, tmp_path):
    folder, found = candidates
    chosen = {"Llama": ("average_acc", "max"), "Cap": ("bleu4.captions", "max"), "Clip": ("top1.classes", "max")}
    for model, (metric, mode) in chosen.items():
        select(candidates, model, by(metric=metric, mode=mode))
    infos = [folder / "chosen" / model / "selection_info.json" for model in chosen]
    summary.summarize(found, infos, tmp_path / "candidates.tsv", tmp_path / "SUMMARY.md")
    frame = pandas.read_csv(tmp_path / "candidates.tsv", sep="\t").set_index(["model", "candidate"])
    assert frame.loc[("Cap", "good"), "bleu4.captions"] > frame.loc[("Cap", "poor"), "bleu4.captions"]
    assert frame.loc["Clip"]["bleu4.captions"].isna().all() and frame.loc["Cap"]["average_acc"].isna().all()
    page = (tmp_path / "SUMMARY.md").read_text()
    part = {model: page.partition(f"## {model}\n")[2].partition("\n## ")[0] for model in chosen}
    assert "bleu4.captions" in part["Cap"] and "average_acc" not in part["Cap"]
    assert "top5.classes" in part["Clip"] and "answer_ppl" not in part["Clip"]
    assert "BLEU-4 against perplexity of answers of Cap's candidates" in part["Cap"]
    assert "Image to text recall@1 against text to image recall@1 of Clip's candidates" in part["Clip"]
    assert "- `bleu4.captions`: BLEU-4 on captions, a number from 0 to 1, higher is better" in page
    assert "- `answer_ppl.captions`: perplexity of answers to captions, a number of at least 1, lower is better" in page
    assert all((tmp_path / f"figures/{model}.svg").is_file() for model in chosen)
