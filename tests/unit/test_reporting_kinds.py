"""The study report of a study that mixes kinds of models, each measured by metrics of its own."""

import re

import pandas
import pytest
from rich.console import Console
from synthetic_kinds import mixed

from coppice.core import records
from coppice.report import provenance, study_report
from coppice.report.study_report import answers, measurements
from coppice.report.study_report import study_records as studies

GROUPS = {
    "By accuracy: Llama and Qwen": ("mean zero-shot accuracy", "perplexity on wikitext2"),
    "By BLEU-4: Cap": ("BLEU-4 on captions", "perplexity of answers to captions"),
    "By exact match: View": ("exact match on questions", "perplexity of answers to questions"),
    "By image to text recall@1: Clip": ("image to text recall@1 on pairs", "text to image recall@1 on pairs"),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return a built study of four kinds, with its report."""
    kinds = {"Llama": None, "Cap": "captioner", "Qwen": None, "View": "image-text", "Clip": "dual"}
    built = mixed(tmp_path_factory.mktemp("study"), items=60, **kinds).build()
    (built.results / "report/figures").mkdir(parents=True)
    for name in ("tradeoff-9.svg", "my-own.svg"):
        (built.results / "report/figures" / name).write_text("")
    study_report.write_report(built.results, built.pairs, built.models, built.results / "report")
    return built


def read(study):
    return studies.read(study.results, study.pairs, study.models)


def page(study, kind="md"):
    return (study.results / f"report/study_report.{kind}").read_text()


def test_groups_models_by_the_metrics_that_they_share(study):
    found = {group.title: tuple(metric.label for metric in group.axes) for group in read(study).groups}
    assert found == GROUPS
    for title in GROUPS:
        assert page(study).count(f"### {title}\n") == 2  # above the answers and above the table
        assert page(study, "html").count(f">{title}</h3>") == 2


def test_a_study_of_models_that_share_their_metrics_is_one_group(tmp_path):
    built = mixed(tmp_path, items=20, Llama=None, Qwen=None, configs=("best_acc",)).build()
    (built.folder("dense", "Qwen") / "evaluation_results.json").unlink()
    whole = read(built)
    assert whole.groups == [whole] and not whole.is_part


def test_a_study_of_captioners_asks_what_applies_and_has_no_figure_of_tasks(tmp_path):
    built = mixed(tmp_path, items=20, Cap="captioner", configs=("best_acc",)).build()
    assert [answer.key for answer in answers.answers(read(built), measurements.gather(read(built)))] == [
        "recovery",
        "tradeoff",
    ]
    study_report.write_report(built.results, built.pairs, built.models, built.results / "report")
    assert "Change in each task" not in page(built)
    assert (built.results / "report/figures/task_changes.png").is_file()  # which the workflow expects


def test_models_without_any_evaluation_come_last(study):
    whole = studies.read(study.results, [("New", "best_acc"), *study.pairs], {"New": {}, **study.models})
    assert [group.title for group in whole.groups] == [*GROUPS, "Not measured yet: New"]


def test_each_group_answers_the_questions_that_apply_by_its_own_metric(study):
    by_title = {group.title: answers.answers(group, measurements.gather(group)) for group in read(study).groups}
    keys = {title: [answer.key for answer in found] for title, found in by_title.items()}
    assert keys["By BLEU-4: Cap"] == ["start", "recovery", "tradeoff"]
    assert "families" in keys["By accuracy: Llama and Qwen"] and "variants" not in keys["By accuracy: Llama and Qwen"]
    sentence = {answer.key: answer for answer in by_title["By BLEU-4: Cap"]}
    part = records.read(study.folder("finetuned", "Cap", "best_acc") / "comparison.json")["bleu4"]["captions"]
    both = [
        records.read(study.folder("finetuned", "Cap", config) / "comparison.json")["bleu4"]["captions"]
        for config in study.configs
    ]
    gained = sum(one["finetuned"] - one["pruned"] for one in both)
    share = gained / sum(one["dense"] - one["pruned"] for one in both)
    assert sentence["recovery"].sentence.startswith(f"Fine-tuning recovers {100 * share:.0f} % [")
    assert "of the BLEU-4 on captions that pruning lost" in sentence["recovery"].sentence
    assert f"{100 * part['finetuned']:.1f}" in page(study)


def test_tables_have_the_metrics_of_their_group_with_unit_and_direction(study):
    html = page(study, "html")
    tables = re.findall(r"<table id=\"main-table.*?</table>", html, re.DOTALL)
    cap, rest = (table for table in tables if ">Cap<" in table)  # a table has up to three metrics
    assert "BLEU-4 on captions (x100), higher is better" in cap and "exact match on captions (%)" in rest
    assert "perplexity of answers to captions, lower is better" in cap
    for table in (cap, rest):
        assert "zero-shot" not in table and "recall" not in table and ">Llama<" not in table
    assert sum(">Llama<" in table for table in tables) == 1


def test_draws_a_figure_for_each_group_that_has_something_to_draw(study):
    names = {path.stem for path in (study.results / "report/figures").glob("*.svg")} - {"my-own"}
    assert {"tradeoff", "tradeoff-2", "tradeoff-3", "tradeoff-4", "task_changes", "training", "cost"} <= names
    assert "tradeoff-5" not in names and "task_changes-2" not in names and "cost-2" not in names
    assert set(study_report.FIGURES) <= names
    for title in ("Accuracy against perplexity (Llama and Qwen)", "BLEU-4 against perplexity of answers (Cap)"):
        assert title in page(study)
    assert len(re.findall(r"<svg", page(study, "html"))) == len(names)
    ids = re.findall(r'\bid="([^"]+)"', page(study, "html"))
    assert len(ids) == len(set(ids))


def test_removes_figures_of_groups_that_are_gone_and_no_other_files(study):
    assert not (study.results / "report/figures/tradeoff-9.svg").exists()  # which was there before
    assert (study.results / "report/figures/my-own.svg").exists()


def test_tables_hold_the_numbers_of_every_kind(study):
    frame = pandas.read_csv(study.results / "report/comparisons.csv").set_index(["model", "config"])
    part = records.read(study.folder("finetuned", "Clip", "best_acc") / "comparison.json")["text_to_image_r1"]["pairs"]
    row = frame.loc["Clip", "best_acc"]
    assert row["text_to_image_r1.pairs_finetuned"] == pytest.approx(part["finetuned"])
    assert row["text_to_image_r1.pairs_recovered_low"] == pytest.approx(part["recovered"]["interval"][0])
    assert pandas.isna(row["average_acc_dense"])
    tasks = pandas.read_csv(study.results / "report/tasks.csv")
    assert set(tasks[tasks["model"] == "Clip"]["metric"]) >= {"image_to_text_r10", "top5"}
    assert set(tasks[tasks["model"] == "Llama"]["metric"]) == {"acc", "acc_norm"}


def test_shows_items_whose_written_answer_changed(study):
    found = measurements.gather(next(group for group in read(study).groups if "View" in group.models))
    item = found.changed["View", "best_acc"]["questions"]["gained"][0]
    assert " or " in item["target"]
    assert item["after"] in item["target"] and item["before"] not in item["target"]


def test_the_page_says_how_the_metrics_were_computed(study):
    text = page(study)
    assert "signature nrefs:2|case:mixed|eff:no|tok:none|smooth:none".replace("|", "¦") in text
    assert "leaves out a row at a time" in text and "candidates 60" in text


def test_the_terminal_shows_a_table_for_each_group(study, tmp_path):
    console = Console(width=120, file=(tmp_path / "shown").open("w"))
    study_report.overview(study.results, study.pairs, console)
    console.file.close()
    shown = (tmp_path / "shown").read_text()
    for heading in ("acc %", "BLEU-4", "exact %", "i2t R@1", "t2i R@1", "answer ppl"):
        assert heading in shown
    assert shown.count("recovered share of what pruning lost") == len(GROUPS)


def traced(words, tmp_path, metric=None):
    console = Console(width=200, file=(tmp_path / "shown").open("w"))
    provenance.trace(words, console, metric=metric)
    console.file.close()
    return (tmp_path / "shown").read_text()


@pytest.mark.parametrize(("model", "metric"), [("Cap", "bleu4.captions"), ("Clip", "image_to_text_r5.pairs")])
def test_a_trace_finds_the_numbers_of_a_metric(study, tmp_path, model, metric):
    folder = study.folder("finetuned", model, "best_acc")
    shown = traced([str(folder / "comparison_report.txt")], tmp_path, metric)
    section, name = metric.split(".")
    values = records.read(folder / "comparison.json")[section][name]
    assert [float(value) for value in re.findall(rf" {re.escape(metric)} +([\d.e-]+)", shown)] == pytest.approx(
        [values[stage] for stage in ("dense", "pruned", "finetuned")], rel=1e-5
    )


def test_a_trace_shows_how_answers_were_generated(tmp_path):
    built = mixed(tmp_path / "results", items=20, Cap="captioner", configs=("best_acc",)).build()
    path = built.folder("finetuned", "Cap", "best_acc") / "evaluation_results.json"
    record = records.read(path)
    record["provenance"]["settings"] = {"zero_shot": {"tasks": []}, "answers": {"datasets": ["captions"], "beams": 4}}
    records.write(path, record)
    shown = traced([str(path.parent / "comparison_report.txt")], tmp_path)
    assert re.search(r"answers \(datasets captions,\s+beams 4\)", shown)


def test_a_trace_finds_the_tables_of_a_mixed_study_in_agreement_with_the_records(study, tmp_path):
    assert "the report  3 checks: 3 agree" in traced([str(study.results)], tmp_path)
