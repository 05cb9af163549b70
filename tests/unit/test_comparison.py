"""The comparison of one model and config: its numbers, its report, and what it rejects."""

import json
import shutil

import numpy
import pandas
import pytest
from scipy import stats
from synthetic_records import Synthetic

from coppice.core import fingerprints, records
from coppice.core.errors import CoppiceError
from coppice.render import formatting
from coppice.stages.compare import comparison, report_text
from coppice.stats import stored_samples

ONE = {"Llama": {"variant": "base", "family": "llama", "base": "miniature/llama"}}
SIZE = {"configs": ("best_acc",), "items": 80, "windows": 60}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Synthetic(tmp_path_factory.mktemp("built"), ONE, **SIZE).build()


@pytest.fixture
def study(built, tmp_path):
    """Return a copy of the study that a test may change."""
    shutil.copytree(built.results, tmp_path, dirs_exist_ok=True)
    return Synthetic(tmp_path, ONE, **SIZE)


@pytest.fixture
def record(study):
    return records.read(study.folder("finetuned", "Llama", "best_acc") / "comparison.json")


def _report(study):
    return (study.folder("finetuned", "Llama", "best_acc") / "comparison_report.txt").read_text()


def _edit(path, change):
    record = records.read(path)
    change(record)
    records.write(path, record)


def _correct(study, stage, task):
    return pandas.read_parquet(study.folder(stage, "Llama", "best_acc") / "samples" / f"{task}.parquet")["correct"]


def test_every_task_has_its_paired_change_and_exact_test(study, record):
    before, after = (_correct(study, stage, "piqa") for stage in ("pruned", "finetuned"))
    task = record["zero_shot"]["piqa"]
    assert task["change"]["value"] == pytest.approx((after - before).mean())
    gained, lost = int(((after - before) > 0).sum()), int(((after - before) < 0).sum())
    assert (task["gained_items"], task["lost_items"]) == (gained, lost)
    assert task["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert task["p_holm"] >= task["p"]


def test_every_task_also_has_the_loss_from_pruning(study, record):
    dense, pruned = (_correct(study, stage, "boolq") for stage in ("dense", "pruned"))
    assert record["zero_shot"]["boolq"]["lost"]["value"] == pytest.approx((pruned - dense).mean())


def test_average_and_extremes_follow_from_the_tasks(record):
    changes = {name: task["change"]["value"] for name, task in record["zero_shot"].items()}
    mean = record["average_acc"]
    assert mean["change"]["value"] == pytest.approx(numpy.mean(list(changes.values())))
    fraction = (mean["finetuned"] - mean["pruned"]) / (mean["dense"] - mean["pruned"])
    assert mean["recovered"]["value"] == pytest.approx(fraction)
    assert record["extremes"] == {
        "largest": max(changes, key=changes.get),
        "smallest": min(changes, key=changes.get),
    }


def test_perplexity_is_that_of_the_evaluation(study, record):
    for stage in ("dense", "pruned", "finetuned"):
        evaluated = records.read(study.folder(stage, "Llama", "best_acc") / "evaluation_results.json")
        for name, text in record["perplexity"].items():
            assert text[stage] == evaluated["perplexity"][name]["value"]
    text = record["perplexity"]["wikitext2"]
    assert text["change"]["value"] == pytest.approx(text["finetuned"] - text["pruned"])
    assert text["change_percent"] == pytest.approx(100 * (text["finetuned"] / text["pruned"] - 1))


def test_the_report_fits_a_terminal_and_is_complete(study, record):
    text = _report(study)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    words = ("candidate-0", "width", "760,000", "gptq-2048", "wikitext2", "ptb", "mean", "Largest change", "training")
    for word in (*words, *record["zero_shot"]):
        assert word in text


def test_the_report_does_not_truncate_wide_numbers_and_long_names(study, record):
    record["perplexity"]["wikitext2"] |= {"dense": 9.5, "pruned": 123456.7, "finetuned": 4.2e9}
    record["perplexity"]["wikitext2"]["change"] = {"value": -123456.7, "interval": [-1.5e8, -1000.5]}
    record["zero_shot"]["a_task_with_quite_a_long_name_of_its_own"] = record["zero_shot"]["piqa"] | {"n": 10042}
    from coppice.stages.compare.report_text import render

    text = render(record)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text and "-123457" in text and "4.2e+09" in text


def test_the_report_has_no_table_for_an_evaluation_without_texts(record):
    assert "Perplexity (lower" in report_text.render(record)
    assert "Perplexity (lower" not in report_text.render(record | {"perplexity": {}})


def test_rejects_evaluations_on_different_items(study):
    path = study.folder("finetuned", "Llama", "best_acc") / "samples" / "piqa.parquet"
    frame = pandas.read_parquet(path)
    frame["doc_hash"] = frame["doc_hash"] + "x"
    frame.to_parquet(path, index=False)
    with pytest.raises(CoppiceError, match=r"piqa.parquet: changed after .* delete .*evaluation_results.json and"):
        study.compare("Llama", "best_acc")
    record = path.parent.parent / "evaluation_results.json"
    evaluation = records.read(record)
    evaluation["samples"]["piqa"] = fingerprints.content_digest(path)
    records.write(record, evaluation)
    with pytest.raises(CoppiceError, match=r"piqa.*different items"):
        study.compare("Llama", "best_acc")
    path.unlink()
    with pytest.raises(CoppiceError, match=r"piqa.parquet: is missing; delete .*evaluation_results.json and run"):
        study.compare("Llama", "best_acc")


def test_removes_the_samples_of_a_task_that_was_dropped(tmp_path):
    rows = [{"doc_id": 0, "doc_hash": "a", "correct": 1.0}]
    before = stored_samples.write_samples(tmp_path, {"piqa": rows, "boolq": rows})
    after = stored_samples.write_samples(tmp_path, {"piqa": rows})
    assert after == {"piqa": before["piqa"]}
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["piqa.parquet"]


def _other_protocol(record):
    record["perplexity"]["ptb"]["protocol"]["seq_len"] = 128


def _other_metric(record):
    record["zero_shot"]["piqa"]["metric"] = "acc_norm"


def _other_rows(record):
    record["provenance"]["fingerprints"]["datasets"]["piqa"] = "0"


def _other_shots(record):
    record["zero_shot"]["piqa"]["num_fewshot"] = 3


def _other_model(record):
    record["model"] = "Qwen"


def _other_adapter(record):
    record["provenance"]["fingerprints"]["adapter"] = "0"


def _no_task(record):
    del record["zero_shot"]["piqa"]


def _no_adapter(record):
    record["provenance"]["fingerprints"]["adapter"] = None


def _other_weights(record):
    record["provenance"]["fingerprints"]["weights"] = "0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_protocol, "ptb: the finetuned model .* seq_len 128, the dense one with 2048"),
        (_other_metric, "piqa: the finetuned model .* metric acc_norm, the dense one with acc"),
        (_other_rows, "the finetuned and the dense model .* different rows"),
        (_no_task, "different zero_shot data"),
        (_other_shots, "piqa: the finetuned model .* num_fewshot 3, the dense one with"),
        (_other_model, "the finetuned record belongs to model Qwen"),
        (_other_adapter, "with another adapter than the trained one"),
        (_no_adapter, "without its adapter"),
        (_other_weights, "evaluated as finetuned is not the selected one"),
    ],
)
def test_rejects_an_evaluation_that_cannot_be_compared(study, change, message):
    _edit(study.folder("finetuned", "Llama", "best_acc") / "evaluation_results.json", change)
    with pytest.raises(CoppiceError, match=message) as error:
        study.compare("Llama", "best_acc")
    path = study.folder("finetuned", "Llama", "best_acc") / "evaluation_results.json"
    assert str(error.value).startswith(f"{path}: ") and f"delete {path} and " in str(error.value)


def test_rejects_losses_of_another_evaluation(study):
    ours, theirs = (study.folder(stage, "Llama", "best_acc") / "ppl_results.json" for stage in ("pruned", "finetuned"))
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(CoppiceError, match=r"ppl_results\.json: .*evaluation beside it; delete .*evaluation_res"):
        study.compare("Llama", "best_acc")


def test_every_row_of_the_report_keeps_its_name(record):
    """The note of a share without an interval used to take the space of the first column."""
    for text in record["perplexity"].values():
        text |= {"dense": 1139.61, "change_percent": -111.9}
        text["change"] |= {"value": -1114.27, "interval": [-1115.27, -1113.32]}
        text["recovered"] |= {"value": None, "interval": None, "note": "pruning lost nothing"}
    shown = report_text.render(record)
    assert max(map(len, shown.splitlines())) <= 100
    for name in record["perplexity"]:
        assert any(line.strip().startswith(f"{name} ") and "undefined" in line for line in shown.splitlines()), shown
        assert f"recovered on {name}: pruning lost nothing" in shown


def test_rejects_a_pruned_checkpoint_with_the_dense_weights(study):
    dense = records.read(study.folder("dense", "Llama") / "evaluation_results.json")

    def become_dense(record):
        record["provenance"]["fingerprints"]["weights"] = dense["provenance"]["fingerprints"]["weights"]

    _edit(study.folder("pruned", "Llama", "best_acc") / "evaluation_results.json", become_dense)
    with pytest.raises(CoppiceError, match="has the dense model's weights"):
        study.compare("Llama", "best_acc")


def test_the_report_repeats_the_warnings_of_the_training(study):
    def never_fell(record):
        record["warnings"] = ["the validation loss never fell below its first value (first 1.9, best 1.9)"]

    _edit(study.folder("trained", "Llama", "best_acc") / "finetuning_config.json", never_fell)
    study.compare("Llama", "best_acc")
    assert "WARNING: the validation loss never fell" in _report(study)


def test_the_report_repeats_the_warnings_of_the_evaluations(study):
    def fell_back(record):
        record["warnings"] = ["lm-eval's own backend scored the tasks"]

    def merged(record):
        record["warnings"].append("piqa: 2 of 30 items were left out")

    for stage in ("dense", "pruned", "finetuned"):
        _edit(study.folder(stage, "Llama", "best_acc") / "evaluation_results.json", fell_back)
    _edit(study.folder("dense", "Llama") / "evaluation_results.json", merged)
    study.compare("Llama", "best_acc")
    text = " ".join(_report(study).split())
    assert text.count("WARNING: lm-eval's own backend scored the tasks") == 1
    assert "WARNING: dense: piqa: 2 of 30 items were left out" in text


def test_a_share_just_below_zero_has_no_sign():
    assert [formatting.percent(share) for share in (-0.004, -0.06, 0.625)] == ["0 %", "-6 %", "62 %"]


def test_the_report_tells_how_a_candidate_was_pruned_and_leaves_out_what_had_no_effect():
    point = {"importance": "taylor", "parts": ["mlp", "attention"], "keep_blocks": {"first": 0, "last": 0}, "steps": 1}
    told = point | {"method": "width", "ratio": 0.25, "name": "mine", "ranking": None}
    assert formatting.pruning(told) == "method width, ratio 0.25, importance taylor, parts mlp+attention"
    kept = formatting.pruning(told | {"keep_blocks": {"first": 1, "last": 0}, "steps": 2})
    assert kept.endswith("keep_blocks (first 1, last 0), steps 2")


def test_the_report_repeats_the_warnings_of_the_selected_candidate(study):
    path = study.folder("selected", "Llama", "best_acc") / "selection_info.json"
    _edit(path, lambda record: record.update(warnings=["its ratio was rounded to whole blocks"]))
    study.compare("Llama", "best_acc")
    assert "WARNING: its ratio was rounded to whole blocks" in _report(study)


def test_warns_of_stages_evaluated_with_different_versions(study):
    """As after an update of packages in the middle of a study."""

    def upgraded(record):
        record["provenance"]["versions"] |= {"torch": "2.14.0", "coppice": "0.2.0"}

    for name in ("evaluation_results.json", "ppl_results.json"):
        _edit(study.folder("finetuned", "Llama", "best_acc") / name, upgraded)
    study.compare("Llama", "best_acc")
    expected = "WARNING: the stages were evaluated with other versions of torch: part of a change may be theirs"
    assert expected in " ".join(_report(study).split())


def test_warns_of_few_windows(tmp_path):
    study = Synthetic(tmp_path, ONE, configs=("best_acc",), items=30, windows=1).build()
    record = records.read(study.folder("finetuned", "Llama", "best_acc") / "comparison.json")
    assert record["perplexity"]["ptb"]["change"]["interval"] is None
    assert record["perplexity"]["ptb"]["verdict"] == "no clear change"
    assert any("fewer than 20 windows (1)" in warning for warning in record["warnings"])
    assert any("fewer than 100 items" in text and "boolq (30), piqa (30)" in text for text in record["warnings"])
    assert json.loads(json.dumps(record, allow_nan=False))


def test_says_what_each_interval_resamples(record):
    count = SIZE["items"]
    assert record["zero_shot"]["piqa"]["resampled"] == {"unit": "items", "count": count, "block": None, "note": None}
    assert record["average_acc"]["resampled"]["count"] == 7 * count
    assert record["perplexity"]["wikitext2"]["resampled"]["unit"] == "documents"
    ptb = record["perplexity"]["ptb"]["resampled"]
    assert ptb == {"unit": "windows", "count": 60, "block": 7, "note": None}


def test_the_report_says_what_the_intervals_of_perplexity_resample(study, record):
    text = _report(study)
    assert "intervals on wikitext2: over 60 documents" in text
    assert "intervals on ptb: over 60 windows in blocks of 7" in text


def test_compares_windows_if_an_evaluation_did_not_record_documents(study, record):
    def forget(losses):
        del losses["perplexity"]["wikitext2"]["document_losses"]

    _edit(study.folder("pruned", "Llama", "best_acc") / "ppl_results.json", forget)
    study.compare("Llama", "best_acc")
    again = records.read(study.folder("finetuned", "Llama", "best_acc") / "comparison.json")
    text = again["perplexity"]["wikitext2"]
    assert text["resampled"]["unit"] == "windows"
    assert text["change"]["value"] == record["perplexity"]["wikitext2"]["change"]["value"]
    assert any("before documents were recorded" in warning for warning in again["warnings"])
    assert "before documents were recorded" in _report(study)


def test_reports_the_spread_over_seeds(study):
    tuned = study.folder("finetuned", "Llama", "best_acc")
    folders = {42: tuned}
    for seed, accuracy in ((43, 0.6), (44, 0.7)):
        repeat = records.read(tuned / "evaluation_results.json") | {"average_acc": accuracy}
        folders[seed] = tuned / f"seed-{seed}"
        records.write(folders[seed] / "evaluation_results.json", repeat)
    comparison.compare(
        {"model": "Llama", "config": "best_acc"},
        {stage: study.folder(stage, "Llama", "best_acc") for stage in comparison.STAGES},
        study.folder("selected", "Llama", "best_acc") / "selection_info.json",
        study.folder("trained", "Llama", "best_acc") / "finetuning_config.json",
        {"record": tuned / "comparison.json", "report": tuned / "comparison_report.txt"},
        seeds=folders,
    )
    seeds = records.read(tuned / "comparison.json")["seeds"]
    values = seeds["metrics"]["average_acc"]["values"]
    assert (seeds["seeds"], values[1:]) == ([42, 43, 44], [0.6, 0.7])
    assert seeds["metrics"]["average_acc"]["sd"] == pytest.approx(numpy.std(values, ddof=1))
    assert seeds["metrics"]["ppl.ptb"]["sd"] == 0
    assert "seed 43" in _report(study)


def test_the_report_names_the_zeros_of_a_sparse_candidate_and_the_price_of_keeping_them(record):
    assert "Zeros" not in report_text.render(record)
    text = next(iter(record["perplexity"]))
    zeros = {"weights": 1000, "zeros": 500, "share": 0.5, "pattern": "2:4"}
    record |= {"sparsity": {"pruned": zeros}, "masked_merge": {"perplexity": {text: 41.5}}}
    shown = report_text.render(record)
    assert "Zeros       500 of 1,000 weights (50.0 % zeros (2:4))" in shown
    assert f"perplexity on {text}: 41.5 with the adapter merged" in " ".join(shown.split())
