"""Settings that a kind of model does not have, or by which it would learn nothing, are refused before any job."""

import copy

import pytest
import yaml

from coppice.study import settings

STUDY = """
models:
  L: {base: org/a}
  S:
    {base: org/s, kind: seq2seq, finetune: {data: {dataset: caps}}, evaluate: {answers: {datasets: [caps]}}}
  V:
    {base: org/v, kind: image-text, finetune: {data: {dataset: pics}}, evaluate: {answers: {datasets: [pics]}}}
  D:
    {base: org/d, kind: dual-encoder, finetune: {data: {dataset: pics}}, evaluate: {retrieval: {datasets: [pics]}}}
evaluate: {perplexity: {datasets: [wikitext2]}, zero_shot: {tasks: [piqa]}}
select: {configs: {best: {metric: [bleu4.caps, exact_match.pics, text_to_image_r1.pics, average_acc]}}}
datasets: {caps: {path: org/caps}, pics: {path: org/pics}}
"""


def load(model=None, own=None, **sections):
    config = copy.deepcopy(yaml.safe_load(STUDY)) | sections
    for section, values in (own or {}).items():
        config["models"][model].setdefault(section, {}).update(values)
    return settings.load(config)


def test_each_kind_trains_as_a_study_of_several_says():
    study = load("D", {"finetune": {"batch_size": 2}})
    assert study.finetune_of("D").batch_size == 2 and study.finetune_of("S") is not study.finetune


@pytest.mark.parametrize(
    ("model", "own", "message"),
    [
        ("D", {"finetune": {"batch_size": 1}}, r"models\.D\.finetune\.batch_size: .* \(D\) learns by comparing"),
        ("D", {"finetune": {"arrangement": "tree"}}, r"models\.D\.finetune\.arrangement: found 'tree', .* with null"),
        ("S", {"finetune": {"arrangement": "tree"}}, r"models\.S\.finetune\.arrangement: .* with sorted, null"),
        ("V", {"finetune": {"arrangement": "tree"}}, r"models\.V\.finetune\.arrangement: .* with sorted, null"),
        (
            "S",
            {"finetune": {"data": {"train_on_inputs": True}}},
            r"models\.S\.finetune\.data\.train_on_inputs: .* false",
        ),
        ("V", {"finetune": {"lora": {"towers": {"text": "frozen"}}}}, r"models\.V\.finetune\.lora\.towers: all towers"),
        ("L", {"finetune": {"lora": {"towers": {"text": "frozen"}}}}, r"models\.L\.finetune\.lora\.towers: all towers"),
        ("D", {"evaluate": {"retrieval": {"limit": 1}}}, r"evaluate\.retrieval\.limit: found 1, must be at least 2"),
        (
            "D",
            {"evaluate": {"classification": {"classes": ["a"]}}},
            r"classes: needs at least 2 entries",
        ),
    ],
)
def test_names_the_key_of_what_does_not_apply(model, own, message):
    with pytest.raises(settings.SettingsError, match=message):
        load(model, own)


def test_a_setting_of_the_whole_study_is_named_as_such():
    with pytest.raises(settings.SettingsError, match=r"config key finetune\.batch_size: a dual encoder \(D\)"):
        load(finetune={"batch_size": 1})


def test_a_data_set_is_checked_for_the_kind_of_model_that_reads_it():
    study = load("D", {"finetune": {"data": {"dataset": "alpaca"}}})
    assert study.dataset("alpaca").uses == ["training", "training:dual-encoder"]
    assert study.dataset("caps").uses == ["answers:seq2seq", "training:seq2seq"]
    assert study.dataset("pics").uses == ["answers:image-text", "retrieval", "training:image-text"]
