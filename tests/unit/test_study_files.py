"""The files that jobs rest on: what Snakemake has to know of, so that a change of it is noticed."""

import pytest

from coppice.core.errors import SettingsError
from coppice.study import layout, settings

MODELS = {"Llama-Instruct": {"base": "miniature/llama-instruct", "variant": "instruct"}}


def files(**config):
    return layout.Files(settings.load({"models": MODELS} | config))


def test_a_file_in_a_folder_of_a_local_data_set_that_a_split_names_is_noticed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("train.jsonl", "sub/report.jsonl", "sub/other.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    source = {"kind": "local", "path": str(tmp_path)}
    found = layout.local_files(source, ["train", "sub/report.jsonl", None])
    assert found == [str(tmp_path / "sub/report.jsonl"), str(tmp_path / "train.jsonl")]


def test_every_file_of_a_users_task_definitions_is_noticed(tmp_path):
    (tmp_path / "__pycache__").mkdir()
    for name in ("mine.yaml", "utils.py", "_default_template_yaml", "__pycache__/utils.pyc"):
        (tmp_path / name).write_text("task: mine\n" if name == "mine.yaml" else "")
    found = layout.Files(
        settings.load({"models": MODELS, "evaluate": {"zero_shot": {"include_path": str(tmp_path)}}})
    ).task_definitions()
    assert found == sorted(str(tmp_path / name) for name in ("mine.yaml", "utils.py", "_default_template_yaml"))


def test_of_a_users_candidate_the_checkpoint_counts_and_no_note_beside_it(tmp_path):
    mine = ("config.json", "model.safetensors", "tokenizer.json", "modeling_own.py")
    beside = ("results.json", "training_args.bin", "README.md", "pruning.json", ".cache.json")
    for name in (*mine, *beside):
        (tmp_path / name).write_text("")
    assert layout.candidate_files(tmp_path) == sorted(str(tmp_path / name) for name in mine)


def test_data_that_a_users_task_brings_rests_on_its_definition(tmp_path):
    """Another split or path in the YAML left the rows of the old one in use."""
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: org/mine\ntest_split: test\n")
    tasks = {"tasks": ["mine", "sciq", "piqa"], "include_path": str(tmp_path)}
    found = files(evaluate={"zero_shot": tasks})
    assert [found.dataset_sources(name) for name in tasks["tasks"]] == [[str(tmp_path / "mine.yaml")], [], []]


@pytest.mark.parametrize("odd", ["own{x}/a.txt", "own/b{y}.txt"])
@pytest.mark.parametrize("key", ["model", "data set", "candidate", "task definitions", "start of an ablation"])
def test_a_path_that_no_rule_can_name_is_told_with_its_key(tmp_path, key, odd):
    """A brace in an input is a wildcard to Snakemake, which would stop the whole study with no word of whose it is."""
    folder = (tmp_path / odd).parent
    folder.mkdir()
    (tmp_path / odd).write_text("")
    for name, text in (("config.json", '{"model_type": "llama"}'), ("a.jsonl", "{}"), ("mine.yaml", "task: mine\n")):
        (folder / name).write_text(text)
    (tmp_path / "mine.csv").write_text(f"model,candidate,path\nLlama-Instruct,c,{folder}\n")
    config, named = {
        "model": ({"models": {"M": {"base": str(folder)}}}, "models.M.base"),
        "data set": ({"datasets": {"ptb": {"path": str(folder), "format": "json"}}}, "datasets.ptb.path"),
        "candidate": ({"candidates": {"table": str(tmp_path / "mine.csv")}}, "mine.csv, row 2, column path"),
        "task definitions": ({"evaluate": {"zero_shot": {"include_path": str(folder)}}}, "include_path"),
        "start of an ablation": (
            {"ablations": {"a": {"start": {"checkpoint": str(folder)}, "arms": ["light", "full"]}}},
            "ablations.a.start.checkpoint",
        ),
    }[key]
    if key == "candidate" and folder.name == "own":
        files(**config)  # of a candidate's folder, a checkpoint's files alone are named in a rule
        return
    with pytest.raises(SettingsError) as raised:
        files(**config)
    assert named in str(raised.value) and f"found '{folder}" in str(raised.value)


def test_what_studies_are_tuned_on_makes_no_miniature_model_anew(tmp_path):
    """A miniature instruct model is trained on the miniature instructions, whatever the study tunes on."""
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    usual = files().miniature_parents("llama-instruct")
    assert [path.split("/")[-2] for path in usual] == ["llama", "alpaca"]
    chats = {"path": str(tmp_path / "chats.jsonl"), "format": "json", "splits": {"train": "chats.jsonl"}}
    assert files(datasets={"chats": chats}, finetune={"data": {"dataset": "chats"}}).miniature_parents(
        "llama-instruct"
    ) == [usual[0], "resources/miniature/alpaca/dataset.json"]
    assert files().miniature_parents("llama") == []
