"""A single training by hand, and a try of what came of it: the command line as a person uses it."""

import json
import subprocess
import sys

import pytest
from test_finetuning import instruction_rows

from coppice import cli
from coppice.cli import single_jobs
from coppice.core.errors import SettingsError


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
    """(checkpoint, folder of an adapter, what the command said) of `coppice finetune` in a process of its own."""
    folder, start = tmp_path_factory.mktemp("by hand"), tiny_checkpoint()
    (folder / "mine.json").write_text(json.dumps(instruction_rows()))
    words = [
        "finetune",
        "--model",
        start,
        "--data",
        folder / "mine.json",
        "--output",
        folder / "out",
        "--preset",
        "full",
    ]
    words += ["--r", "4", "--max-steps", "2", "--warmup-steps", "1", "--val-size", "8", "--batch-size", "8"]
    words += ["--eval-steps", "2", "--prompt", "none", "--learning-rate", "1e-2"]
    done = subprocess.run(
        [sys.executable, "-m", "coppice", *map(str, words)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return start, folder / "out", done.stdout + done.stderr


def test_finetune_says_how_much_it_trains_and_leaves_an_adapter(trained):
    _, adapter, said = trained
    assert "trainable params: " in said and " || all params: " in said and " || trainable%: " in said
    settings = json.loads((adapter / "finetuning_config.json").read_text())["settings"]
    assert (settings["lora"]["r"], settings["lora"]["alpha"], settings["max_steps"]) == (4, 64, 2)
    assert (adapter / "adapter_model.safetensors").is_file()


def test_generate_answers_and_writes_the_merged_checkpoint(trained, tmp_path, capsys):
    start, adapter, _ = trained
    words = ["--model", str(start), "--adapter", str(adapter), "--merge", "--output", str(tmp_path / "merged")]
    assert cli.main(["generate", *words, "--prompt", "w7 w8", "--form", "none", "--new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("> w7 w8\n")
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize("place", ["model", "adapter"])
def test_a_merged_checkpoint_never_takes_the_place_of_what_it_was_made_from(trained, place, capsys):
    start, adapter, _ = trained
    folder, weights = {"model": (start, "model"), "adapter": (adapter, "adapter_model")}[place]
    words = ["--model", str(start), "--adapter", str(adapter), "--merge", "--output", str(folder)]
    assert cli.main(["generate", *words, "--prompt", "w7"]) == 1
    assert "is the folder of the model or adapter itself" in capsys.readouterr().err
    assert (folder / f"{weights}.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "train", "told"),
    [
        ({"r": "many"}, "lora", "finetune.lora.r: found 'many'"),
        ({"r": "4"}, "all", "options of an adapter are given"),
        ({"merge": "true"}, "all", "--merge: needs an adapter"),
    ],
)
def test_options_that_do_not_fit_are_told_before_anything_is_loaded(given, train, told):
    with pytest.raises(SettingsError, match=told):
        single_jobs.settings(given, train)


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("epochs", "2"),
        ("learning-rate", "0.0001"),
        ("r", "8"),
        ("target-modules", "all-linear"),
        ("use-dora", "false"),
        ("val-size", "2000"),
        ("gpus", "1"),
    ],
)
def test_the_help_tells_what_holds_where_an_option_is_not_given(option, default, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    said = " ".join(capsys.readouterr().out.split()).partition("options:")[2]
    assert f"(default: {default})" in said.partition(f"--{option} ")[2].partition(" --")[0]
