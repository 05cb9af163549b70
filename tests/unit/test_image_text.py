"""Image-text models: examples with pictures, the engine against transformers' own loss, answers, and pruning."""

import json

import pytest
import torch

from coppice import data, models
from coppice.core.errors import CoppiceError, DataError
from coppice.data import pictures, prompts
from coppice.models import kinds
from coppice.models.kinds import Decoding
from coppice.models.text_examples import IGNORED
from tests.unit import tiny_image_text as tiny

KIND = kinds.named("image-text")
NAMES = list(tiny.CONFIGS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the folder of a checkpoint of an architecture."""
    root = tmp_path_factory.mktemp("image_text")
    return lambda name: folder if (folder := root / name).exists() else tiny.save(name, folder)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Return the dataset.json of rows with one picture or two, of several sizes."""
    folder = tmp_path_factory.mktemp("rows")
    names = tiny.draw(folder, 6)
    rows = [
        {"images": names[:1], "question": "w1 w2", "answers": ["w3 w4 w5"]},
        {"images": names[1:3], "question": "<image> w1 <image> w7", "answers": ["w8"]},
        {"images": names[3:4], "question": "w6", "answers": ["w3 w4 w5 w9 w1", "w2"]},
        {"images": names[3:4], "question": "w1 w2 w5 w6", "answers": ["w3 w4"]},
        {"images": names[4:], "question": "w1 w1 w1", "answers": ["w11 w12 w13"]},
    ]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    entry = {"path": str(folder), "format": "json", "splits": {"train": "train"}, "uses": ["training"]}
    data.prepare("mine", entry, folder / "out", needs_selection=False)
    return folder / "out/dataset.json"


def rows_of(record, reader, prompt="chat"):
    form = prompts.Formatter("image-answer", prompt, reader.tokenizer, pictures.album(record, "train", reader))
    return [form.question(row, f"row {place}") for place, row in enumerate(data.load(record, "train").to_list())]


def loaded(checkpoint, record, name):
    """Return (model, reader, rows, examples) of an architecture."""
    source = models.Source(str(checkpoint(name)), dtype="float32")
    reader = source.reader()
    rows = rows_of(record, reader)
    return models.load(source), reader, rows, [one for own in KIND.examples(rows, reader, 200, False) for one in own]


def alone(model, reader, row):
    """Return the inputs of one row as the model's documentation makes them: by the processor, picture by picture."""
    text, answer = row.question, row.segments[-1].text
    seen = [reader.image_processor(picture.open(), return_tensors="pt") for picture in row.pictures]
    ids = []
    images = iter(seen)
    for word in reader.tokenizer(text, add_special_tokens=False)["input_ids"]:
        count = 1
        if word == tiny.IMAGE:
            one = next(images)
            count = int(one["image_grid_thw"].prod()) // 4 if "image_grid_thw" in one else 16
        ids += [word] * count
    learned = reader.tokenizer(answer, add_special_tokens=False)["input_ids"]
    inputs = {"input_ids": torch.tensor([ids + learned]), "labels": torch.tensor([[-100] * len(ids) + learned])}
    if seen:
        inputs["pixel_values"] = torch.cat([one["pixel_values"] for one in seen])
    if seen and "image_grid_thw" in seen[0]:
        inputs["image_grid_thw"] = torch.cat([one["image_grid_thw"] for one in seen])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny.IMAGE).int()
    return inputs


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_a_token_for_each_feature_and_learns_the_answer_only(checkpoint, record, name):
    model, reader, rows, examples = loaded(checkpoint, record, name)
    for row, example in zip(rows, examples, strict=True):
        own = alone(model, reader, row)
        assert example["input_ids"] == own["input_ids"][0].tolist()
        assert example["labels"] == own["labels"][0].tolist()


@pytest.mark.parametrize("limit", [1, 60, 4000])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_rows_that_run_alone_in_transformers(checkpoint, record, name, limit):
    model, reader, rows, examples = loaded(checkpoint, record, name)
    model.double().requires_grad_(True)
    expected, count = 0, 0
    for row in rows:
        inputs = alone(model, reader, row)
        targets = int((inputs["labels"][:, 1:] != -100).sum())
        expected = expected + model(**inputs).loss * targets
        count += targets
    expected.backward()
    gradients = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    engine = KIND.engine(model, limit)
    micro = list(engine.micro_batches(examples))
    losses = [engine.summed_loss(one) for one in micro]
    torch.stack(losses).sum().backward()
    assert KIND.targets(examples) == count == sum(len(one.targets) for one in micro)
    assert sum(map(float, losses)) == pytest.approx(float(expected), rel=1e-6)  # the sum is in float32
    found = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == gradients.keys() and any("visual" in key or "vision" in key for key in found)
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7)


def test_a_row_whose_pictures_do_not_fit_has_no_example(checkpoint, record):
    reader = models.Source(str(checkpoint("qwen3_vl"))).reader()
    rows = rows_of(record, reader)
    whole = KIND.examples(rows, reader, 200, False)
    places = [place for place, row in enumerate(rows) if row.pictures]
    longest = max(places, key=lambda place: whole[place][0]["input_ids"].count(tiny.IMAGE))
    ids = whole[longest][0]["input_ids"]
    cut = len(ids) - ids[::-1].index(tiny.IMAGE) - 1  # inside the last picture
    found = KIND.examples(rows, reader, cut, True)
    assert found[longest] == [] and all(found[place] for place, row in enumerate(rows) if not row.pictures)


def test_pictures_are_never_learned_even_if_prompts_are(checkpoint, record):
    reader = models.Source(str(checkpoint("qwen3_vl"))).reader()
    for (example,) in KIND.examples(rows_of(record, reader), reader, 200, True):
        pairs = list(zip(example["input_ids"], example["labels"], strict=True))
        assert all((label == IGNORED) == (token == tiny.IMAGE) for token, label in pairs)


def test_a_prefix_tree_is_refused(checkpoint, record):
    model, *_ = loaded(checkpoint, record, "qwen3_vl")
    with pytest.raises(CoppiceError, match=r"finetune\.arrangement: .* Set it to sorted or null"):
        KIND.engine(model, 100, "tree")


@pytest.mark.parametrize("name", NAMES)
def test_answers_in_batches_are_those_of_greedy_steps_on_single_rows(checkpoint, record, name):
    model, reader, rows, _ = loaded(checkpoint, record, name)
    found = KIND.answers(model, reader, rows, Decoding(new_tokens=5, batch_size=3))
    for row, answer in zip(rows, found, strict=True):
        inputs = alone(model, reader, row)
        ids = inputs.pop("input_ids")[:, : -len(reader.tokenizer(row.segments[-1].text)["input_ids"])]
        inputs.pop("labels")
        new = []
        with torch.no_grad():
            for _ in range(5):
                if "mm_token_type_ids" in inputs:
                    inputs["mm_token_type_ids"] = (ids == tiny.IMAGE).int()
                new.append(int(model(input_ids=ids, **inputs, use_cache=False).logits[0, -1].argmax()))
                if new[-1] == reader.tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
        assert answer == reader.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_is_timed_after_answers_about_pictures_is_read_as_before_them(checkpoint, record, name):
    model, reader, rows, _ = loaded(checkpoint, record, name)
    ids = torch.tensor([[5, 6, 7, 8]])

    def continued():
        with torch.no_grad():
            prompt = model(**KIND.timed_inputs(model, ids, None), use_cache=True)
            return model(**KIND.timed_inputs(model, ids[:, :1], prompt), use_cache=True).logits

    fresh = continued()
    KIND.answers(model, reader, rows, Decoding(new_tokens=2, batch_size=3))
    assert torch.equal(continued(), fresh)


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_has_a_picture_that_changes_the_logits_and_one_has_none(checkpoint, name):
    model = models.load(models.Source(str(checkpoint(name)), dtype="float32"))
    *text, seeing = KIND.probes(model)
    assert all(probe.keys() == {"input_ids"} for probe in text)
    with torch.no_grad():
        before = KIND.outputs(model, seeing)
        changed = KIND.outputs(model, seeing | {"pixel_values": -seeing["pixel_values"]})
    assert before.shape[-1] == tiny.TEXT["vocab_size"] and not torch.allclose(before, changed, atol=1e-3)


def test_the_context_is_that_of_the_text_tower(checkpoint):
    model = models.load(models.Source(str(checkpoint("qwen3_vl"))))
    assert models.context_length(model) == tiny.TEXT["max_position_embeddings"]


def test_a_picture_of_a_shape_that_the_processor_does_not_take_is_named(checkpoint):
    from coppice.models import sight

    reader = models.Source(str(checkpoint("qwen3_vl"))).reader()
    thin = pictures.Picture("thin.png", "", 4, 4000, None)
    with pytest.raises(DataError, match=r"thin\.png: the image processor does not take its 4 x 4000 pixels"):
        sight.tokens_of(thin, reader)
