"""`coppice finetune` and `coppice generate`: a single training and its answers, as a person runs them."""

import json
import subprocess
import sys

import pytest
import tiny_seq2seq
from test_finetuning import instruction_rows

from coppice import cli
from coppice.cli import single_jobs
from coppice.core.errors import SettingsError


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
    """Run `coppice finetune` in its own process; return (checkpoint, folder of the adapter, output)."""
    folder, start = tmp_path_factory.mktemp("by hand"), tiny_checkpoint()
    *rows, first, second = instruction_rows()
    (folder / "mine.json").write_text(json.dumps(rows))
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (first, second)))
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
    arguments += ["--r", "4", "--max-steps", "2", "--warmup-steps", "1", "--batch-size", "8"]
    arguments += ["--validation", folder / "held-out.jsonl"]
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


def test_the_validation_loss_is_that_of_a_file_of_its_own(trained):
    record = json.loads((trained[1] / "finetuning_config.json").read_text())
    assert record["validation_rows"] == 2
    assert record["train_rows"] == len(instruction_rows()) - 2


def test_generate_prints_the_answer_and_writes_the_merged_checkpoint(trained, tmp_path, capsys):
    start, adapter, _ = trained
    arguments = ["--model", str(start), "--adapter", str(adapter), "--merge", "--output", str(tmp_path / "merged")]
    assert cli.main(["generate", *arguments, "--prompt", "w7 w8", "--form", "none", "--new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("> w7 w8\n")
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generate_asks_an_encoder_decoder_as_transformers_does(name, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder, question = str(tiny_seq2seq.save(tmp_path / name, name)), "w7 w8 w20"
    (answer,) = single_jobs.generate(single_jobs.Questions(folder, None, [question], new_tokens=6))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = AutoModelForSeq2SeqLM.from_pretrained(folder).generate(
        **tokenizer(question, return_tensors="pt", return_token_type_ids=False), max_new_tokens=6, num_beams=1
    )
    assert answer == {"prompt": question, "text": tokenizer.decode(written[0], skip_special_tokens=True)}
    assert answer["text"]


def test_generate_refuses_pictures_for_a_model_that_reads_none(tmp_path):
    tiny_seq2seq.save(tmp_path / "t5", "t5")
    with pytest.raises(SettingsError, match=r"--image: .* does not answer questions about pictures"):
        single_jobs.generate(single_jobs.Questions(str(tmp_path / "t5"), None, ["w7"], images=["one.png"]))


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
        ({"towers": "{text: frozen}"}, "all", "options of an adapter are given"),
        ({"towers": "{vision: {rank: 8}}"}, "lora", r"finetune\.lora\.towers\.vision.*rank"),
        ({"towers": "vision"}, "lora", "--towers: found 'vision', but a mapping is needed"),
        ({"towers": "{vision: "}, "lora", "--towers: .* is not valid YAML"),
    ],
)
def test_rejects_invalid_options_before_loading_anything(given, train, expected):
    with pytest.raises(SettingsError, match=expected):
        single_jobs.settings(given, train)


@pytest.mark.parametrize("given", [["q_proj,v_proj"], ["q_proj", "v_proj"], ["q_proj,", "v_proj"]])
def test_names_of_layers_are_given_at_commas_or_spaces(given):
    assert single_jobs.settings({"target_modules": given})["lora"]["target_modules"] == ["q_proj", "v_proj"]


def test_one_name_is_a_group_of_layers_or_a_list_of_trackers():
    section = single_jobs.settings({"target_modules": ["attention"], "report_to": ["tensorboard"]})
    assert section["lora"]["target_modules"] == "attention"
    assert section["report_to"] == ["tensorboard"]


def test_towers_are_given_as_yaml():
    section = single_jobs.settings({"towers": "{text: {r: 8, learning_rate: 1.0e-5}, vision: frozen}"})
    assert section["lora"]["towers"]["vision"] == "frozen"
    assert (section["lora"]["towers"]["text"]["r"], section["lora"]["towers"]["text"]["learning_rate"]) == (8, 1e-5)


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


def test_learning_from_a_teacher_needs_one():
    objective = single_jobs.settings({"kl": "0.5", "ce": "0.5", "teacher": "./dense"})["objective"]
    assert (objective["ce"], objective["kl"], objective["teacher"]) == (0.5, 0.5, "./dense")
    for given, words in (({"kl": "1"}, "--kl: needs a model"), ({"temperature": "2"}, "--temperature: has no effect")):
        with pytest.raises(SettingsError, match=words):
            single_jobs.settings(given)
