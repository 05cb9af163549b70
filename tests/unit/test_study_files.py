"""The files that jobs depend on, which Snakemake must know so that it notices their changes."""

import pytest

from coppice.core.errors import SettingsError
from coppice.study import layout, settings
from coppice.study.settings.resolved import Source

MODELS = {"Llama-Instruct": {"base": "miniature/llama-instruct", "variant": "instruct"}}


def files(**config):
    return layout.Files(settings.load({"models": MODELS} | config))


def test_tracks_the_files_of_a_local_dataset_that_splits_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("train.jsonl", "sub/report.jsonl", "sub/other.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    source = Source(kind="local", path=str(tmp_path))
    found = layout.local_files(source, ["train", "sub/report.jsonl", None])
    assert found == [str(tmp_path / "sub/report.jsonl"), str(tmp_path / "train.jsonl")]


def test_tracks_every_file_of_a_users_task_definitions(tmp_path):
    (tmp_path / "__pycache__").mkdir()
    for name in ("mine.yaml", "utils.py", "_default_template_yaml", "__pycache__/utils.pyc"):
        (tmp_path / name).write_text("task: mine\n" if name == "mine.yaml" else "")
    found = layout.Files(
        settings.load({"models": MODELS, "evaluate": {"zero_shot": {"include_path": str(tmp_path)}}})
    ).task_definitions()
    assert found == sorted(str(tmp_path / name) for name in ("mine.yaml", "utils.py", "_default_template_yaml"))


def test_tracks_only_the_checkpoint_files_of_a_users_candidate(tmp_path):
    mine = ("config.json", "model.safetensors", "tokenizer.json", "modeling_own.py")
    beside = ("results.json", "training_args.bin", "README.md", "pruning.json", ".cache.json")
    for name in (*mine, *beside):
        (tmp_path / name).write_text("")
    assert layout.candidate_files(tmp_path) == sorted(str(tmp_path / name) for name in mine)


def test_the_data_of_a_users_task_depends_on_its_definition(tmp_path):
    """Without this, another split or path in the YAML would leave the old rows in use."""
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: org/mine\ntest_split: test\n")
    tasks = {"tasks": ["mine", "sciq", "piqa"], "include_path": str(tmp_path)}
    found = files(evaluate={"zero_shot": tasks})
    assert [found.dataset_sources(name) for name in tasks["tasks"]] == [[str(tmp_path / "mine.yaml")], [], []]


@pytest.mark.parametrize("odd", ["own{x}/a.txt", "own/b{y}.txt"])
@pytest.mark.parametrize("key", ["model", "data set", "candidate", "task definitions", "start of an ablation"])
def test_names_the_key_of_a_path_with_braces(tmp_path, key, odd):
    """Snakemake takes a brace in an input for a wildcard and would stop the whole study without naming the key."""
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
        files(**config)  # rules name only the checkpoint files of a candidate's folder
        return
    with pytest.raises(SettingsError) as raised:
        files(**config)
    assert named in str(raised.value) and f"found '{folder}" in str(raised.value)


def test_other_training_data_does_not_rebuild_a_miniature_model(tmp_path):
    """A miniature instruct model is trained on the miniature instructions, whatever data the study trains on."""
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    usual = files().miniature_parents("llama-instruct")
    assert [path.split("/")[-2] for path in usual] == ["llama", "alpaca"]
    chats = {"path": str(tmp_path / "chats.jsonl"), "format": "json", "splits": {"train": "chats.jsonl"}}
    assert files(datasets={"chats": chats}, finetune={"data": {"dataset": "chats"}}).miniature_parents(
        "llama-instruct"
    ) == [usual[0], "resources/miniature/alpaca/dataset.json"]
    assert files().miniature_parents("llama") == []
