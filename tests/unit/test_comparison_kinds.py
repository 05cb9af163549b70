"""Comparisons of models that have neither accuracies nor perplexities on texts."""

import re

import pytest
from synthetic_kinds import mixed

from coppice.core import records
from coppice.core.errors import CoppiceError
from coppice.stages.compare import comparison


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return a built study of one model of each kind."""
    kinds = {"Cap": "captioner", "View": "image-text", "Clip": "dual", "Code": "code"}
    return mixed(tmp_path_factory.mktemp("study"), items=80, **kinds).build()


def report(study, model):
    return (study.folder("finetuned", model, "best_acc") / "comparison_report.txt").read_text()


def record(study, model):
    return records.read(study.folder("finetuned", model, "best_acc") / "comparison.json")


@pytest.mark.parametrize("model", ["Cap", "View", "Clip", "Code"])
def test_the_text_report_fits_and_names_no_metric_that_was_not_measured(study, model):
    text = report(study, model)
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search("zero-shot|perplexity on|Largest change|the mean", text)
    assert record(study, model)["extremes"] is None and "zero_shot" not in record(study, model)


def test_rows_name_their_metric_with_its_unit_below_the_direction(study):
    text = " ".join(report(study, "Cap").split())
    assert "Answers (higher is better)" in text and "Answers (lower is better)" in text
    part = record(study, "Cap")["bleu4"]["captions"]
    values = " ".join(f"{100 * part[stage]:.1f}" for stage in ("dense", "pruned", "finetuned"))
    assert f"BLEU-4 on 80 {values}" in text and "captions (x100)" in text
    dual = report(study, "Clip")
    assert "Retrieval (higher is better)" in dual and "Classification (higher is better)" in dual


def test_warns_of_few_items_once_for_a_data_set_and_of_models_at_chance(study, tmp_path):
    warnings = record(study, "Clip")["warnings"]
    assert "fewer than 100 items, too few to see any but large changes: pairs (80) and classes (80)" in warnings
    assert not any("chance" in warning for warning in warnings)
    poor = mixed(tmp_path, items=80, Clip="dual")
    evaluate = poor._evaluation
    poor._evaluation = lambda folder, identity, skill: evaluate(folder, identity, min(skill, -0.2))
    poor.build()
    found = [warning for warning in record(poor, "Clip")["warnings"] if "chance" in warning]
    assert any(
        warning.startswith(
            "top-1 accuracy on classes: the dense, pruned and finetuned model is not above chance (6.2 %)"
        )
        for warning in found
    )


@pytest.mark.parametrize(("model", "section", "key"), [("Cap", "bleu4", "signature"), ("Clip", "top1", "candidates")])
def test_refuses_stages_that_were_measured_differently(study, tmp_path, model, section, key):
    stages = {"dense": study.folder("dense", model), "pruned": study.folder("pruned", model, "best_acc")}
    files = {stage: folder / "evaluation_results.json" for stage, folder in stages.items()}
    results = {stage: records.read(file) for stage, file in files.items()}
    comparison.check_alike(results, files)
    name = next(iter(results["pruned"][section]))
    results["pruned"][section][name][key] = "other"
    with pytest.raises(CoppiceError, match=f"the pruned model was measured with {key} other"):
        comparison.check_alike(results, files)
