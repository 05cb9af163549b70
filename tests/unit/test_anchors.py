"""Published values beside a study's own: only of the same model under the same protocol, and never without a source."""

from pathlib import Path

import pytest
import yaml

from coppice import cli
from coppice.core import records
from coppice.report import anchors
from tests.unit.synthetic_records import Synthetic

ROOT = Path(__file__).parents[2]
LLAMA = "meta-llama/Llama-2-7b-hf"


@pytest.fixture
def study(tmp_path):
    built = Synthetic(
        tmp_path / "results", {"Mine": {"variant": "base", "family": "llama", "base": LLAMA}}, ["best_acc"]
    )
    return built.build()


def rewrite(path, edit):
    record = records.read(path)
    edit(record)
    records.write(path, {key: value for key, value in record.items() if key not in ("schema_version", "checksum")})


def measured_as_published(study, stage="dense", **changes):
    """Let a record hold the perplexity 6.0 on WikiText2 under Wanda's protocol, with `changes` of the protocol."""

    def edit(record):
        text = record["perplexity"]["wikitext2"]
        text["value"] = 6.0
        text["protocol"] |= {"seq_len": 4096, "stride": 4096, "bos": "none"} | changes

    config = None if stage == "dense" else "best_acc"
    rewrite(study.folder(stage, "Mine", config) / "evaluation_results.json", edit)


def pruned_by(study, settings):
    path = study.folder("selected", "Mine", "best_acc") / "selection_info.json"
    rewrite(path, lambda record: record.update(pruning=settings))


def own(study, base=LLAMA):
    from coppice.report.study_report import study_records

    found = study_records.read(study.results, study.pairs, {"Mine": {"base": base}})
    return [anchor for anchor in anchors.compared(found) if anchor.own is not None]


def test_shows_the_dense_model_and_the_relative_difference(study):
    measured_as_published(study)
    (found,) = own(study)
    assert (found.published, found.own, found.measured_as) == (5.12, 6.0, "Mine")
    assert found.relative == pytest.approx((6.0 - 5.12) / 5.12)
    assert found.difference == "BOS none"


def test_finds_a_further_protocol_of_the_record(study):
    def edit(record):
        text = record["perplexity"]["wikitext2"]
        longer = text | {"value": 7.0, "protocol": text["protocol"] | {"seq_len": 4096, "stride": 4096, "bos": "once"}}
        record["perplexity_more"] = {"wanda": {"wikitext2": longer}}

    rewrite(study.folder("dense", "Mine") / "evaluation_results.json", edit)
    (found,) = own(study)
    assert (found.own, found.difference) == (7.0, "")


@pytest.mark.parametrize("change", [{"seq_len": 2048}, {"stride": 512}, {"join": " "}, {"split": "validation"}])
def test_another_protocol_is_not_compared(study, change):
    measured_as_published(study, **change)
    assert own(study) == []


def test_another_model_is_not_compared(study):
    measured_as_published(study)
    assert own(study, "meta-llama/Llama-2-70b-hf") == [] and own(study, None) == []


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({"ratio": 0.5, "importance": "wanda", "pattern": None}, 6.42),
        ({"ratio": 0.5, "importance": "sparsegpt"}, 6.51),
        ({"ratio": 0.9, "importance": "wanda", "pattern": "2:4"}, 11.02),  # with a pattern the ratio is not used
        ({"ratio": 0.5, "importance": "wanda-one-shot"}, None),
        ({"ratio": 0.6, "importance": "wanda"}, None),
    ],
)
def test_a_pruned_model_is_compared_if_it_was_pruned_alike(study, settings, published):
    measured_as_published(study, "pruned")
    pruned_by(study, {"method": "unstructured"} | settings)
    assert [anchor.published for anchor in own(study)] == ([] if published is None else [published])


def test_width_pruning_must_keep_the_same_blocks(study):
    point = {"method": "width", "ratio": 0.25, "importance": "taylor", "parts": ["mlp", "attention"]}
    measured_as_published(study, "pruned", seq_len=2048, stride=2048)
    kept = {"keep_blocks": {"first": 4, "last": 2}, "ranking": "uniform", "steps": 1}
    for more, expected in ((kept, [12.71]), ({}, []), (kept | {"ranking": "global"}, []), (kept | {"steps": 3}, [])):
        pruned_by(study, point | more)
        found = own(study, "meta-llama/Llama-3.1-8B")
        assert [anchor.published for anchor in found if anchor.result.pruning] == expected


@pytest.mark.parametrize(("shots", "chat", "compared"), [(0, False, True), (5, False, False), (0, True, False)])
def test_a_task_is_compared_with_as_many_examples_in_the_prompt(study, shots, chat, compared):
    def edit(record):
        record["zero_shot"]["boolq"] |= {"num_fewshot": shots, "chat_template": chat, "acc": 0.8}

    rewrite(study.folder("dense", "Mine") / "evaluation_results.json", edit)
    found = [(anchor.published, anchor.own) for anchor in own(study)]
    assert found == ([(0.7774, 0.8)] if compared else [])


def test_every_value_has_a_source_that_can_be_opened_and_a_revision():
    for anchor in anchors.published():
        assert anchor.publication.url.startswith("https://") and anchor.publication.revision
        assert anchor.published > 0 and anchor.result.models
    text = anchors.PUBLISHED.read_text(encoding="utf-8")
    named = sum(len(result["values"]) for entry in yaml.safe_load(text) for result in entry["results"])
    assert len(anchors.published()) == named


@pytest.mark.parametrize(
    ("model", "pruned", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", False, {6.24, 10.57, 14.31, 27.74}),
        ("meta-llama/Llama-3.1-8B", True, {12.71, 20.61, 25.93, 47.98}),
    ],
)
def test_holds_llm_pruners_table(model, pruned, expected):
    rows = [a for a in anchors.published() if model in a.result.models and bool(a.result.pruning) == pruned]
    assert {anchor.published for anchor in rows} == expected


def test_a_protocol_must_be_complete():
    with pytest.raises(ValueError, match="lacks split"):
        anchors.Protocol(text="ptb", join="", seq_len=128, stride=128, bos="once")


def test_the_documentation_lists_the_published_values():
    assert anchors.markdown() in (ROOT / "docs/anchors.md").read_text(encoding="utf-8")


def test_the_command_shows_the_table_and_says_what_it_needs(study, capsys):
    measured_as_published(study)
    assert cli.main(["anchors", str(study.results)]) == 0
    shown = capsys.readouterr().out
    assert "5.12" in shown and "Comparable numbers of this study: 0." in shown and "Give --configfile" in shown
    config = study.results.parent / "study.yaml"
    model = {"base": LLAMA, "variant": "base", "family": "llama"}
    config.write_text(yaml.safe_dump({"models": {"Mine": model}}))
    code = cli.main(["anchors", str(study.results), "--configfile", str(ROOT / "config/config.yaml"), str(config)])
    shown = capsys.readouterr().out
    assert code == 0 and "+17.19%" in shown and "BOS none" in shown and "Comparable numbers of this study: 1." in shown


def test_the_command_prints_the_published_values(capsys):
    assert cli.main(["anchors", "--markdown"]) == 0
    assert capsys.readouterr().out == anchors.markdown()
