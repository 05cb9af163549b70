"""`coppice finetune` and `coppice generate`: a single training and its answers, as a person runs them."""

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
    """Run `coppice finetune` in its own process; return (checkpoint, folder of the adapter, output)."""
    folder, start = tmp_path_factory.mktemp("by hand"), tiny_checkpoint()
    (folder / "mine.json").write_text(json.dumps(instruction_rows()))
    arguments = [
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
    arguments += ["--r", "4", "--max-steps", "2", "--warmup-steps", "1", "--val-size", "8", "--batch-size", "8"]
    arguments += ["--eval-steps", "2", "--prompt", "none", "--learning-rate", "1e-2"]
    done = subprocess.run(
        [sys.executable, "-m", "coppice", *map(str, arguments)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return start, folder / "out", done.stdout + done.stderr


def test_finetune_prints_its_trainable_parameters_and_writes_an_adapter(trained):
    _, adapter, output = trained
    assert "trainable params: " in output and " || all params: " in output and " || trainable%: " in output
    settings = json.loads((adapter / "finetuning_config.json").read_text())["settings"]
    assert (settings["lora"]["r"], settings["lora"]["alpha"], settings["max_steps"]) == (4, 64, 2)
    assert (adapter / "adapter_model.safetensors").is_file()


def test_generate_prints_the_answer_and_writes_the_merged_checkpoint(trained, tmp_path, capsys):
    start, adapter, _ = trained
    arguments = ["--model", str(start), "--adapter", str(adapter), "--merge", "--output", str(tmp_path / "merged")]
    assert cli.main(["generate", *arguments, "--prompt", "w7 w8", "--form", "none", "--new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("> w7 w8\n")
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize("place", ["model", "adapter"])
def test_merging_never_overwrites_the_model_or_the_adapter(trained, place, capsys):
    start, adapter, _ = trained
    folder, weights = {"model": (start, "model"), "adapter": (adapter, "adapter_model")}[place]
    arguments = ["--model", str(start), "--adapter", str(adapter), "--merge", "--output", str(folder)]
    assert cli.main(["generate", *arguments, "--prompt", "w7"]) == 1
    assert "is the folder of the model or adapter itself" in capsys.readouterr().err
    assert (folder / f"{weights}.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "train", "expected"),
    [
        ({"r": "many"}, "lora", "finetune.lora.r: found 'many'"),
        ({"r": "4"}, "all", "options of an adapter are given"),
        ({"merge": "true"}, "all", "--merge: needs an adapter"),
    ],
)
def test_rejects_invalid_options_before_loading_anything(given, train, expected):
    with pytest.raises(SettingsError, match=expected):
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
def test_the_help_shows_the_defaults(option, default, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    output = " ".join(capsys.readouterr().out.split()).partition("options:")[2]
    assert f"(default: {default})" in output.partition(f"--{option} ")[2].partition(" --")[0]
