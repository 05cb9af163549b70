"""Image-text models through the stages: trained, saved with their processor, evaluated, and asked."""

import json

import pandas
import pytest
import torch

from coppice import cli, data, models
from coppice.core import records
from coppice.core.errors import DataError
from coppice.models import kinds
from coppice.stages import evaluate, recover
from tests.unit import tiny_image_text as tiny

KIND = kinds.named("image-text")
PROCESSOR = ("preprocessor_config.json", "tokenizer.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save("qwen3_vl", tmp_path_factory.mktemp("start") / "model", initializer_range=0.05)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Return the JSONL of 48 questions about pictures, whose answers repeat their question."""
    folder = tmp_path_factory.mktemp("rows")
    names = tiny.draw(folder, 48)
    rows = [
        {"image": name, "question": f"w{place % 7}", "answer": f"w{place % 7} w9"} for place, name in enumerate(names)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def trained(start, dataset, tmp_path_factory):
    """Return the folder of an adapter that `coppice finetune` trained and merged."""
    output = tmp_path_factory.mktemp("trained") / "adapter"
    options = {
        "--r": 4,
        "--dropout": 0,
        "--max-steps": 8,
        "--batch-size": 8,
        "--learning-rate": 0.01,
        "--cutoff-len": 160,
    }
    options |= {"--val-size": 8, "--eval-steps": 4, "--save-steps": 4, "--warmup-steps": 1}
    words = ["finetune", "--model", start, "--data", dataset, "--output", output, "--merge"]
    words += [word for option in options.items() for word in option]
    assert cli.main([str(word) for word in words]) == 0
    return output


def test_training_lowers_the_loss_of_pictures_rows(trained):
    record = records.read(trained / "finetuning_config.json")
    assert record["arrangement"] == "sorted" and record["skipped_rows"] == 0
    assert record["settings"]["prompt"] == "chat"  # the usual one of the kind
    assert record["validation_loss"] < record["first_validation_loss"]


def test_the_adapter_is_on_the_text_tower_alone(trained):
    from safetensors.torch import load_file

    names = load_file(trained / "adapter_model.safetensors")
    assert names and all("language_model" in name for name in names)


@pytest.mark.parametrize("place", [".", "merged"])
def test_the_processor_goes_wherever_weights_go(trained, start, place):
    for name in PROCESSOR:
        assert (trained / place / name).read_bytes() == (start / name).read_bytes()


def test_the_model_card_loads_the_adapter_on_the_right_class(trained):
    card = (trained / "README.md").read_text()
    assert "model = AutoModelForImageTextToText.from_pretrained(" in card and "\n\n\n" not in card
    assert "pipeline_tag: image-text-to-text" in card and 'AutoImageProcessor.from_pretrained("this folder"' in card


def test_plain_peft_and_plain_transformers_load_what_was_trained(trained, start):
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(start)
    adapted = PeftModel.from_pretrained(base, trained).eval()
    merged = AutoModelForImageTextToText.from_pretrained(trained / "merged").eval()
    probe = KIND.probes(merged)[-1]
    with torch.no_grad():
        torch.testing.assert_close(adapted(**probe).logits, merged(**probe).logits, rtol=1e-4, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(trained / "merged", backend="pil").patch_size == 4


def test_answers_about_pictures_are_measured_with_samples_beside_tasks_of_text(trained, start, dataset, tmp_path):
    entry = {"path": str(dataset), "format": "json", "splits": {"report": "report"}, "uses": []}
    data.prepare("pictures", entry, tmp_path / "pictures", needs_selection=False)
    text = [{"text": " ".join(f"w{(i * j) % 90}" for j in range(50))} for i in range(20)]
    data.write("wikitext2", {"report": text}, tmp_path / "wikitext2")
    sets = {name: str(tmp_path / name / "dataset.json") for name in ("pictures", "wikitext2")}
    how = evaluate.Evaluate.model_validate(
        {
            "perplexity": {"datasets": ["wikitext2"]},
            "zero_shot": {"tasks": []},
            "answers": {"datasets": ["pictures"], "new_tokens": 4, "limit": 12},
            "cost": {"enabled": True},
        }
    )
    source, identity = models.Source(str(start)), {"model": "M", "config": None, "stage": "finetuned"}
    request = evaluate.EvaluationRequest(
        identity, source, how, sets, tmp_path / "out", adapter=str(trained), prompt="chat"
    )
    evaluate.evaluate(request)
    record = records.read(tmp_path / "out/evaluation_results.json")
    rows = pandas.read_parquet(tmp_path / "out/samples/pictures.parquet")
    assert len(rows) == 12 and list(rows["references"][3]) == ["w3 w9"]
    right = [row.answer == row.references[0] for row in rows.itertuples()]
    assert record["exact_match"]["pictures"]["value"] == pytest.approx(sum(right) / 12)
    tokens = rows["answer_tokens"].sum()
    assert record["answer_ppl"]["pictures"]["value"] == pytest.approx(
        float(torch.tensor(rows["answer_nll"].sum() / tokens).exp()), rel=1e-5
    )
    assert {"wikitext2"} == set(record["perplexity"]) and record["merge_drift"]["max_logit_difference"] < 1e-3


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_a_killed_training_ends_with_the_same_adapter(
    start, trained, dataset, tmp_path
):
    from safetensors.torch import load_file

    entry = {"path": str(dataset), "format": "json", "splits": {"train": "train"}, "uses": ["training"]}
    data.prepare("mine", entry, tmp_path / "rows", needs_selection=False)
    settings = dict(records.read(trained / "finetuning_config.json")["provenance"]["settings"])
    settings.pop("prompt")
    settings |= {"data": {"dataset": "mine", "val_size": 8, "cutoff_len": 160}, "merge": False}
    how = recover.TrainingSettings.model_validate(settings)

    def train(output, **more):
        identity, source = {"model": "M", "config": "c"}, models.Source(str(start))
        sets = {"mine": str(tmp_path / "rows/dataset.json")}
        request = recover.TrainingRequest(identity, source, sets, how, "chat", output, seed=42, **more)
        recover.finetune(request)

    def adapter(folder):
        return load_file(folder / "adapter_model.safetensors")

    train(tmp_path / "two", world=2)
    train(tmp_path / "cut", stop_share=0.5)  # a checkpoint at half of the steps, and no result
    train(tmp_path / "cut")
    expected, two, resumed = adapter(trained), adapter(tmp_path / "two"), adapter(tmp_path / "cut")
    assert all(resumed[key].equal(tensor) for key, tensor in expected.items())
    assert all(torch.allclose(two[key], tensor, atol=1e-4) for key, tensor in expected.items())


def test_generate_answers_a_question_about_pictures(start, trained, dataset, capsys):
    pictures = [str(dataset.parent / f"{place}.png") for place in range(2)]
    words = ["generate", "--model", str(start), "--adapter", str(trained), "--new-tokens", "3"]
    shown = [word for picture in pictures for word in ("--image", picture)]
    assert cli.main([*words, *shown, "--prompt", "w1 <image> w2 <image>"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("> w1 <image> w2 <image>\n") and first.split("\n")[1]
    assert cli.main([*words, *shown, "--prompt", "w1 <image>"]) == 1
    assert "marks 1 pictures with <image>, but the row has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), (b"<svg/>", "is an SVG drawing"), (b"\x89PNG\r\n\x1a\nnothing", "is")],
)
def test_generate_names_a_picture_that_it_cannot_use(start, tmp_path, content, reason, capsys):
    file = tmp_path / "a.png"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["generate", "--model", str(start), "--image", str(file), "--prompt", "w1"]) == 1
    message = capsys.readouterr().err
    assert f"--image: {file} {reason}" in message and "Name another file" in message


def test_a_prompt_format_that_the_kind_does_not_take_is_named(start, capsys):
    assert cli.main(["generate", "--model", str(start), "--form", "alpaca", "--prompt", "w1"]) == 1
    assert "--form: is alpaca, but an image-text model takes chat or none" in capsys.readouterr().err


def test_a_model_of_text_reads_no_pictures(tiny_checkpoint, dataset, capsys):
    words = ["--model", str(tiny_checkpoint("llama")), "--image", str(dataset.parent / "0.png"), "--prompt", "w1"]
    assert cli.main(["generate", *words]) == 1
    assert "a causal language model does not answer questions about pictures" in capsys.readouterr().err


def test_rows_that_do_not_fit_are_counted_and_none_is_left_is_an_error(start, dataset, tmp_path):
    entry = {"path": str(dataset), "format": "json", "splits": {"train": "train"}, "uses": ["training"]}
    data.prepare("mine", entry, tmp_path / "rows", needs_selection=False)
    sets = {"mine": str(tmp_path / "rows/dataset.json")}
    reader = models.Source(str(start)).reader()
    lengths = []
    for cutoff in (20, 200):
        settings = recover.TrainingSettings.model_validate(
            {"data": {"dataset": "mine", "val_size": 0, "cutoff_len": cutoff}}
        ).data
        train, _, facts = recover.examples.prepare(sets, settings, "chat", reader, 0, KIND)
        assert facts["skipped_rows"] + len(train) == 48
        lengths.append(len(train))
    assert 0 < lengths[0] < lengths[1] == 48
    with pytest.raises(DataError, match=r"no training row has .*cutoff_len \(5\)"):
        recover.examples.prepare(sets, settings.model_copy(update={"cutoff_len": 5}), "chat", reader, 0, KIND)
