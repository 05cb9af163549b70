"""Dual encoders from rows with pictures: training, adapters of single towers, and what an evaluation measures."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_finetuning import SETTINGS
from transformers import AutoModel

from coppice import cli, data, models
from coppice.core import records
from coppice.core.errors import DataError, SettingsError
from coppice.data.row_sources import RowSource
from coppice.models import contrastive, kinds
from coppice.models.kinds import Decoding
from coppice.models.rows import Row
from coppice.stages import evaluate, recover
from coppice.study.settings.sections.evaluate import Evaluate
from tests.unit import tiny_dual_encoders as tiny

KIND = kinds.named("dual-encoder")
COUNT = 24


def prepared(folder, name, rows, role="train"):
    """Write JSON lines with pictures, prepare them, and return the path of dataset.json."""
    place = folder / name
    (place / "in").mkdir(parents=True)
    for number in range(COUNT):
        tiny.Picture(number).open().save(place / f"in/{number}.png")
    (place / f"in/{role}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    entry = {"path": str(place / "in"), "format": "json", "splits": {role: role}, "uses": ["training"]}
    data.prepare(name, entry, place / "out", needs_selection=False)
    return place / "out/dataset.json"


def captioned(count=COUNT):
    return [
        {"image": f"{n}.png", "captions": [tiny.WORDS[n % 24], f"a photo of a {tiny.WORDS[n % 24]}"]}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("pairs"), "mine", captioned())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return models.Source(str(tiny.save("clip", tmp_path_factory.mktemp("clip"))))


def train(source, dataset, output, world=1, stop_share=None, **changes):
    lora = SETTINGS["lora"] | changes.pop("lora", {})
    how = recover.TrainingSettings.model_validate(SETTINGS | {"lora": lora, "micro_batch_size": 1} | changes)
    identity = {"model": "M", "config": "c"}
    request = recover.TrainingRequest(identity, source, {"mine": dataset}, how, "none", output, seed=3, world=world)
    recover.finetune(replace(request, stop_share=stop_share))
    if stop_share:
        return None
    return records.read(output / "finetuning_config.json")


def test_learns_pairs_in_micro_batches_as_in_one_batch(clip, pairs, tmp_path):
    small = train(clip, pairs, tmp_path / "small")
    big = train(clip, pairs, tmp_path / "big", micro_batch_size=64)
    # each of 16 rows in training gives two pairs
    assert small["train_rows"] == 32 and small["validation_rows"] == 16 and small["steps"] == 6
    assert small["validation_loss"] < small["first_validation_loss"]
    assert small["validation_loss"] == pytest.approx(big["validation_loss"], rel=1e-4)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("big", "small"))
    assert all(torch.allclose(expected[name], tensor, atol=1e-5) for name, tensor in found.items())
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(clip.path), tmp_path / "small")
    ours = models.load(clip, tmp_path / "small")
    probe = KIND.probes(ours)[0]
    with torch.no_grad():
        assert torch.equal(KIND.outputs(plain.eval(), probe), KIND.outputs(ours, probe))
        called = plain(**probe).logits_per_text
        assert torch.equal(called, plain.get_base_model()(**probe).logits_per_text)
        assert not torch.equal(called, AutoModel.from_pretrained(clip.path).eval()(**probe).logits_per_text)
    assert (tmp_path / "small/preprocessor_config.json").is_file()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(clip, pairs, tmp_path):
    one, two = train(clip, pairs, tmp_path / "one"), train(clip, pairs, tmp_path / "two", world=2)
    assert two["processes"] == 2 and two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(expected[name], tensor, atol=1e-4) for name, tensor in found.items())


def test_labels_are_learned_as_captions(clip, tmp_path):
    """Rows of one label have one text, so that they are no negatives of each other."""
    rows = [{"image": f"{n}.png", "label": ["disk", "bar", "ring"][n % 3]} for n in range(COUNT)]
    dataset = prepared(tmp_path, "mine", rows)
    source = RowSource("mine", dataset, "train", "none", clip.reader(), KIND.row_kinds)
    made = KIND.examples([source.to_learn(n)[0] for n in range(6)], clip.reader(), 77, False)
    text = clip.reader().tokenizer.decode(made[1][0]["input_ids"], skip_special_tokens=True)
    assert text.replace(" ", "").startswith("aphotoofabar")
    keys = torch.tensor([own[0]["keys"] for own in made])
    assert contrastive.belonging(keys).sum(1).tolist() == [1] * 6
    record = train(clip, dataset, tmp_path / "out")
    assert record["train_rows"] == 16 and record["skipped_rows"] == 0


def evaluated(source, output, datasets, adapter=None, **sections):
    settings = Evaluate.model_validate({"perplexity": {"datasets": []}, "zero_shot": {"tasks": []}} | sections)
    request = evaluate.EvaluationRequest(
        {"model": "M", "stage": "dense"}, source, settings, datasets, output, adapter=adapter
    )
    evaluate.evaluate(request)
    return records.read(output / "evaluation_results.json")


def similarity(source, texts, numbers):
    """Cosine similarities [texts, pictures] from transformers' own forward pass, one pair at a time."""
    reader, model = source.reader(), AutoModel.from_pretrained(source.path)
    found = numpy.zeros((len(texts), len(numbers)))
    with torch.no_grad():
        for row, text in enumerate(texts):
            for column, number in enumerate(numbers):
                pixels = reader.image_processor([tiny.Picture(number).open()], return_tensors="pt")["pixel_values"]
                out = model(input_ids=torch.tensor([reader.tokenizer(text)["input_ids"]]), pixel_values=pixels)
                found[row, column] = float(out.text_embeds[0] @ out.image_embeds[0])
    return found


def test_recall_is_that_of_a_plain_count_over_all_pairs(clip, tmp_path):
    rows = captioned(10)
    rows[7]["captions"] = [rows[2]["captions"][0], "small white ring"]  # a caption of two pictures
    rows.append({"image": "3.png", "captions": ["small green bar"]})  # a picture in two rows
    dataset = prepared(tmp_path, "mine", rows, role="report")
    record = evaluated(clip, tmp_path / "out", {"mine": str(dataset)}, retrieval={"datasets": ["mine"]})
    captions = [(n, text) for n in range(10) for row in rows if row["image"] == f"{n}.png" for text in row["captions"]]
    scores = similarity(clip, [text for _, text in captions], range(10))
    owned = {n: {text for m, text in captions if m == n} for n in range(10)}
    for depth in (1, 5, 10):
        hits = 0
        for place, (_, text) in enumerate(captions):
            best = max(scores[place, n] for n in range(10) if text in owned[n])
            hits += sum(scores[place, n] > best + 1e-6 for n in range(10) if text not in owned[n]) < depth
        found = record[f"text_to_image_r{depth}"]["mine"]
        assert found["value"] == pytest.approx(hits / len(captions)) and found["candidates"] == 10
        hits = 0
        for n in range(10):
            best = max(scores[place, n] for place, (_, text) in enumerate(captions) if text in owned[n])
            hits += (
                sum(scores[p, n] > best + 1e-6 for p, (_, text) in enumerate(captions) if text not in owned[n]) < depth
            )
        found = record[f"image_to_text_r{depth}"]["mine"]
        assert found["value"] == pytest.approx(hits / 10) and found["n"] == 10 and found["candidates"] == len(captions)
    assert 0 < record["text_to_image_r1"]["mine"]["chance"] < 0.2
    assert set(record["samples"]) == {"mine.image_to_text", "mine.text_to_image"}
    again = evaluated(clip, tmp_path / "out", {"mine": str(dataset)}, retrieval={"datasets": ["mine"]})
    assert again["samples"] == record["samples"]


def test_classes_are_found_by_averaged_prompts(clip, tmp_path):
    names, templates = ["disk", "bar", "ring"], ["a photo of a {}.", "big {}"]
    rows = [{"image": f"{n}.png", "label": names[n % 3]} for n in range(12)]
    dataset = prepared(tmp_path, "mine", rows, role="report")
    asked = {"datasets": ["mine"], "templates": templates}
    record = evaluated(clip, tmp_path / "out", {"mine": str(dataset)}, classification=asked)
    reader, model = clip.reader(), AutoModel.from_pretrained(clip.path)

    def ids(text):
        return torch.tensor([reader.tokenizer(text)["input_ids"]])

    def unit(x):
        return x / x.norm()

    with torch.no_grad():
        heads = []
        for name in names:
            each = [unit(model.get_text_features(ids(t.format(name))).pooler_output[0]) for t in templates]
            heads.append(unit(sum(each) / 2))
        right = 0
        for n in range(12):
            pixels = reader.image_processor([tiny.Picture(n).open()], return_tensors="pt")["pixel_values"]
            embedding = unit(model.get_image_features(pixels).pooler_output[0])
            right += max(range(3), key=lambda c: float(heads[c] @ embedding)) == n % 3
    assert record["top1"]["mine"] == {
        "value": right / 12,
        "n": 12,
        "candidates": 3,
        "chance": pytest.approx(1 / 3),
        "templates": templates,
    }
    assert record["top5"]["mine"]["value"] == 1
    asked |= {"classes": ["disk", "bar", "ring", "cube"], "limit": 6}
    listed = evaluated(clip, tmp_path / "out", {"mine": str(dataset)}, classification=asked)
    assert listed["top1"]["mine"]["candidates"] == 4 and listed["top1"]["mine"]["n"] == 6
    asked |= {"classes": ["disk", "ring"]}
    with pytest.raises(DataError, match=r"row 1: its label 'bar' is not one of the 2 classes.*Add it there"):
        evaluated(clip, tmp_path / "out", {"mine": str(dataset)}, classification=asked)


def test_an_adapter_is_measured_and_merged(clip, pairs, tmp_path):
    train(clip, pairs, tmp_path / "lora")
    record = evaluated(clip, tmp_path / "out", {}, adapter=tmp_path / "lora")
    assert record["adapter_effect"]["max_logit_difference"] > 1e-3
    assert record["merge_drift"]["max_logit_difference"] < 1e-5


def test_the_mean_recall_of_validation_rows_is_that_of_a_plain_count(clip):
    texts = [tiny.WORDS[n] for n in (0, 1, 2, 3, 0, 5)]  # pictures 0 and 4 have one caption
    rows = [
        Row([], True, True, False, {}, references=(text,), pictures=(tiny.Picture(n),)) for n, text in enumerate(texts)
    ]
    validator = KIND.validators["recall@1"]
    outputs = validator.outputs(KIND, models.load(clip), clip.reader(), rows, Decoding())
    scores = similarity(clip, texts, range(6))
    right = numpy.array([[texts[i] == texts[j] for j in range(6)] for i in range(6)])
    by_text = numpy.mean([right[i][scores[i].argmax()] for i in range(6)])
    by_picture = numpy.mean([right[:, j][scores[:, j].argmax()] for j in range(6)])
    assert validator.higher_is_better and validator.value(outputs, rows) == pytest.approx((by_text + by_picture) / 2)


def test_the_best_checkpoint_may_be_that_of_the_best_recall(clip, pairs, tmp_path):
    one = train(clip, pairs, tmp_path / "one", best_by="recall@1")
    history = records.read(tmp_path / "one/training_state.json")["history"]
    found = {entry["step"]: entry["eval_recall@1"] for entry in history if "eval_recall@1" in entry}
    assert sorted(found) == [2, 4, 6] and one["best_step"] == min(found, key=lambda step: (-found[step], step))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "1.png", "text": "a disk"}] * 9, r"need the columns image \| images and caption \| captions"),
        (
            [{"images": [f"{n}.png", f"{n + 1}.png"], "caption": "two"} for n in range(9)],
            r"text 'two' has 2 pictures \(\d\.png, \d\.png\), but a dual",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named_before_training(clip, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        train(clip, prepared(tmp_path, "mine", rows), tmp_path / "out")


def test_one_pair_has_nothing_to_be_compared_with(clip, tmp_path):
    dataset = prepared(tmp_path, "mine", [{"image": "1.png", "caption": "red"}])
    with pytest.raises(DataError, match="dataset mine: one row is left to train on, but a dual encoder learns by"):
        train(clip, dataset, tmp_path / "out", data=SETTINGS["data"] | {"val_size": 0})


def test_a_whole_model_is_trained_with_its_scale(clip, pairs, tmp_path):
    record = train(clip, pairs, tmp_path / "out", train="all", learning_rate=1e-3)
    trained = load_file(tmp_path / "out/model/model.safetensors")
    before = load_file(f"{clip.path}/model.safetensors")
    assert record["validation_loss"] < record["first_validation_loss"]
    assert not torch.equal(trained["logit_scale"], before["logit_scale"])


def test_weights_are_not_shared_while_embeddings_are_exchanged(clip, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("coppice.stages.recover.engine.sharding.wanted", lambda *_: True)
    with pytest.raises(SettingsError, match=r"finetune\.sharding: the processes that train a dual encoder"):
        train(clip, pairs, tmp_path / "out", sharding=True)


def test_coppice_generate_names_a_model_that_writes_no_text(clip, capsys):
    assert cli.main(["generate", "--model", clip.path, "--prompt", "hello"]) != 0
    assert "is a dual encoder, which writes no text" in capsys.readouterr().err
