"""The section `evaluate`: protocols of one's own, folders of task definitions, groups; and what is refused."""

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


def test_a_protocol_of_ones_own_is_completed_and_measured_beside_a_known_one():
    texts = {"protocol": ["gptq-2048", "mine"], "protocols": {"mine": {"seq_len": "64", "stride": 32}}}
    study = load(perplexity=texts)
    first, mine = perplexity.protocols(study.evaluate["perplexity"])
    assert first.name == "gptq-2048"
    assert (mine.seq_len, mine.stride, mine.join_of("x"), mine.role_of("x", "report")) == (64, 32, "\n\n", "report")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (
            {"protocol": "gptq-1024"},
            "evaluate.perplexity.protocol: found 'gptq-1024'; valid are gptq-2048, llmpruner-128",
        ),
        ({"protocol": []}, "evaluate.perplexity.protocol: must not be empty"),
        ({"protocol": ["gptq-2048", "gptq-2048"]}, "listed twice"),
        ({"protocols": {"mine": {"seq_len": 64, "stride": 65}}}, "protocols.mine.stride: found 65, must be at most"),
        ({"protocols": {"gptq-2048": {"seq_len": 64}}}, "protocols.gptq-2048: Coppice has a protocol of this name"),
        ({"protocols": {"mine": {"stride": 64}}}, "protocols.mine.seq_len is missing: Tokens a window"),
        ({"protocols": {"mine": {"seq_len": 64, "split": "test"}}}, "protocols.mine.split is unknown"),
        ({"protocols": {"a/b": {"seq_len": 64}}}, "cannot be part of a path"),
    ],
)
def test_a_wrong_protocol_is_named(texts, words):
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
def test_rows_that_a_protocol_reads_are_asked_for_before_any_job(protocol, splits, words):
    """LLM-Pruner's reads the validation rows of PTB, and candidates are then scored on those for training."""
    config = MODEL | {
        "datasets": {"ptb": {"splits": splits}},
        "select": {"configs": {"best_ppl": {"metric": "ppl.ptb", "mode": "min"}}},
        "evaluate": {
            "perplexity": {"protocol": protocol, "protocols": {"mine": {"seq_len": 64, "role": "train"}}},
        },
    }
    if words is None:
        assert settings.load(config).datasets["ptb"]["splits"]["report"] == "test"
        return
    with pytest.raises(settings.SettingsError, match=words):
        settings.load(config)


def test_a_knee_asks_for_rows_of_the_text_alone_that_it_is_of():
    config = MODEL | {
        "datasets": {"ptb": {"splits": {"train": None}}},
        "select": {"configs": {"balanced": {"pareto": "knee"}}},
        "evaluate": {"perplexity": {"protocol": "llmpruner-128"}},
    }
    assert "ppl.wikitext2" in settings.load(config).configs["balanced"]["metrics"]


def test_tasks_of_a_folder_are_known_and_the_folder_becomes_absolute(tmp_path):
    (tmp_path / "definitions").mkdir()
    (tmp_path / "definitions/mine.yaml").write_text("task: mine\ndataset_path: nowhere\n")
    study = load(tmp_path, zero_shot={"tasks": ["piqa", "mine"], "include_path": "definitions"})
    assert study.evaluate["zero_shot"]["include_path"] == str(tmp_path / "definitions")
    said = message(tmp_path, zero_shot={"tasks": ["mime"], "include_path": "definitions"})
    assert "no task 'mime'; did you mean 'mine'" in said


@pytest.mark.parametrize("task", ["mmlu", "glue"])
def test_a_group_of_tasks_is_told_as_such(task):
    assert f"'{task}' is a group of tasks; name the tasks themselves" in message(zero_shot={"tasks": [task]})


def test_a_folder_without_definitions_is_named(tmp_path):
    assert "include_path: there is no folder no" in message(tmp_path, zero_shot={"include_path": "no"})
    (tmp_path / "empty").mkdir()
    assert "no .yaml file in empty defines a task" in message(tmp_path, zero_shot={"include_path": "empty"})
