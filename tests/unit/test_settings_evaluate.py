"""The section `evaluate`: custom protocols, folders of task definitions, groups of tasks, and what is rejected."""

import pytest

from coppice.stages.evaluate import perplexity
from coppice.study import settings

MODEL = {"models": {"Llama": {"base": "miniature/llama"}}}


def load(workdir=None, **evaluate):
    return settings.load(MODEL | {"evaluate": evaluate}, workdir=workdir)


def message(workdir=None, **evaluate):
    with pytest.raises(settings.SettingsError) as raised:
        load(workdir, **evaluate)
    return str(raised.value)


def test_completes_a_custom_protocol_beside_a_built_in_one():
    texts = {"protocol": ["gptq-2048", "mine"], "protocols": {"mine": {"seq_len": "64", "stride": 32}}}
    study = load(perplexity=texts)
    first, mine = perplexity.protocols(study.evaluate.perplexity)
    assert first.name == "gptq-2048"
    assert (mine.seq_len, mine.stride, mine.join_of("x"), mine.role_of("x", "report")) == (64, 32, "\n\n", "report")


@pytest.mark.parametrize(
    ("texts", "needs"),
    [
        ({}, False),
        ({"bos": "every-window"}, True),
        ({"protocol": ["gptq-2048", "shortened-llm-128"]}, True),
        ({"protocol": "shortened-llm-128", "bos": "once"}, False),
        ({"protocol": "mine", "protocols": {"mine": {"seq_len": 64, "bos": "every-window"}}}, True),
        ({"protocol": "mine", "bos": "every-window", "protocols": {"mine": {"seq_len": 64, "bos": "none"}}}, False),
    ],
)
def test_a_tokenizer_needs_bos_if_a_protocol_in_use_begins_every_window_with_it(texts, needs):
    assert load(perplexity=texts).needs_bos("Llama") is needs


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"bos": True}, "evaluate.perplexity.bos"),
        (
            {"protocol": "gptq-1024"},
            "evaluate.perplexity.protocol: found 'gptq-1024'; valid are gptq-2048, llmpruner-128",
        ),
        ({"protocol": []}, "evaluate.perplexity.protocol: must not be empty"),
        ({"protocol": ["gptq-2048", "gptq-2048"]}, "listed twice"),
        ({"protocols": {"mine": {"seq_len": 64, "stride": 65}}}, "protocols.mine.stride: found 65, must be at most"),
        ({"protocols": {"gptq-2048": {"seq_len": 64}}}, "protocols.gptq-2048: Coppice has a protocol of this name"),
        ({"protocols": {"mine": {"stride": 64}}}, "protocols.mine.seq_len is missing: Tokens per window"),
        ({"protocols": {"mine": {"seq_len": 64, "split": "test"}}}, "protocols.mine.split is unknown"),
        ({"protocols": {"a/b": {"seq_len": 64}}}, "cannot be part of a path"),
    ],
)
def test_names_what_is_wrong_in_a_protocol(texts, words):
    assert words in message(perplexity=texts)


@pytest.mark.parametrize(
    ("protocol", "splits", "words"),
    [
        (
            "llmpruner-128",
            {"selection": None},
            "datasets.ptb.splits.selection is null, but evaluate.perplexity.protocol",
        ),
        ("llmpruner-128", {"train": None}, "datasets.ptb.splits.train is null, but evaluate.perplexity.protocol needs"),
        (["gptq-2048", "llmpruner-128"], {"train": None}, None),
        (["gptq-2048", "mine"], {"train": None}, "splits.train is null, but evaluate.perplexity.protocol needs it"),
        ("gptq-2048", {"selection": None, "train": None}, None),
    ],
)
def test_requires_the_splits_that_a_protocol_reads(protocol, splits, words):
    """LLM-Pruner's protocol reads the validation rows of PTB, so candidates are scored on the training rows."""
    config = MODEL | {
        "datasets": {"ptb": {"splits": splits}},
        "select": {"configs": {"best_ppl": {"metric": "ppl.ptb", "mode": "min"}}},
        "evaluate": {
            "perplexity": {"protocol": protocol, "protocols": {"mine": {"seq_len": 64, "role": "train"}}},
        },
    }
    if words is None:
        assert settings.load(config).datasets["ptb"].splits.report == "test"
        return
    with pytest.raises(settings.SettingsError, match=words):
        settings.load(config)


def test_a_knee_requires_only_the_rows_of_its_own_text():
    config = MODEL | {
        "datasets": {"ptb": {"splits": {"train": None}}},
        "select": {"configs": {"balanced": {"pareto": "knee"}}},
        "evaluate": {"perplexity": {"protocol": "llmpruner-128"}},
    }
    assert "ppl.wikitext2" in settings.load(config).criteria_of("Llama")["balanced"]["metrics"]


def test_accepts_the_tasks_of_a_folder_and_makes_its_path_absolute(tmp_path):
    (tmp_path / "definitions").mkdir()
    (tmp_path / "definitions/mine.yaml").write_text("task: mine\ndataset_path: nowhere\n")
    study = load(tmp_path, zero_shot={"tasks": ["piqa", "mine"], "include_path": "definitions"})
    assert study.evaluate.zero_shot.include_path == str(tmp_path / "definitions")
    error = message(tmp_path, zero_shot={"tasks": ["mime"], "include_path": "definitions"})
    assert "no task 'mime'; did you mean 'mine'" in error


@pytest.mark.parametrize("task", ["mmlu", "glue"])
def test_rejects_a_group_of_tasks(task):
    assert f"'{task}' is a group of tasks; name the tasks themselves" in message(zero_shot={"tasks": [task]})


def test_names_a_folder_without_task_definitions(tmp_path):
    assert "include_path: there is no folder no" in message(tmp_path, zero_shot={"include_path": "no"})
    (tmp_path / "empty").mkdir()
    assert "no .yaml file in empty defines a task" in message(tmp_path, zero_shot={"include_path": "empty"})
