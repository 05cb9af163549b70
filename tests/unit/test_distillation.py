"""Training on a teacher's predictions, from the settings to the records."""

import pytest
import tiny_seq2seq
import torch
from test_finetuning import SETTINGS, adapter_of, instruction_rows

from coppice import data, models
from coppice.core import records
from coppice.core.errors import SettingsError
from coppice.models import kinds
from coppice.stages import recover
from coppice.stages.recover import distillation
from coppice.study.settings.sections.finetune import Objective

HALF = {"ce": 0.5, "kl": 0.5, "temperature": 2.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.write("mine", {"train": instruction_rows()}, folder)
    return folder / "dataset.json"


@pytest.fixture(scope="module")
def student(tiny_checkpoint):
    return tiny_checkpoint("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint):
    return tiny_checkpoint("llama", intermediate_size=40)  # of other widths and layers than the student


def request(student, teacher, dataset, output, objective=HALF, **more):
    lasting = {key: more.pop(key) for key in ("stop_share", "world") if key in more}
    how = recover.TrainingSettings.model_validate(SETTINGS | {"objective": objective} | more)
    sources = [None if folder is None else models.Source(str(folder)) for folder in (student, teacher)]
    identity = {"model": "M", "config": "c"}
    return recover.TrainingRequest(
        identity, sources[0], {"mine": dataset}, how, "none", output, seed=3, teacher=sources[1], **lasting
    )


def train(*arguments, **more):
    asked = request(*arguments, **more)
    recover.finetune(asked)
    return records.read(asked.output / "finetuning_config.json")


def dense_loss(student, teacher, examples, ce, kl, warmth):
    """Return the mean loss per target of examples, each run alone, with full logits in float64."""
    total = count = 0
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        wanted = labels != -100
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, :-1][wanted].double() for model in (student, teacher))
        t, s = (torch.log_softmax(logits / warmth, -1) for logits in (theirs, ours))
        total += kl * warmth**2 * (t.exp() * (t - s)).sum().item()
        total += ce * torch.nn.functional.cross_entropy(ours, labels[wanted], reduction="sum").item()
        count += int(wanted.sum())
    return total / count


def test_records_the_loss_the_teacher_and_how_much_of_it_is_back(student, teacher, dataset, tmp_path):
    record = train(student, teacher, dataset, tmp_path / "out")
    kind, source = kinds.named("causal-lm"), models.Source(str(student))
    from coppice.stages.recover import examples

    how = recover.TrainingSettings.model_validate(SETTINGS)
    _, validation, _ = examples.prepare({"mine": dataset}, how.data, "none", source.reader(), 3, kind)
    whole, dense = models.load(source), models.load(models.Source(str(teacher)))
    assert record["kl_to_teacher"]["before"] == pytest.approx(dense_loss(whole, dense, validation, 0, 1, 1), rel=1e-5)
    tuned = models.load_adapter(whole, tmp_path / "out")
    assert record["kl_to_teacher"]["after"] == pytest.approx(dense_loss(tuned, dense, validation, 0, 1, 1), rel=1e-5)
    # the best checkpoint goes by the objective itself
    assert record["validation_loss"] == pytest.approx(dense_loss(tuned, dense, validation, 0.5, 0.5, 2), rel=1e-5)
    assert record["kl_to_teacher"]["after"] < record["kl_to_teacher"]["before"]
    size = models.parameters(dense)
    assert record["teacher"]["parameters"] == size
    assert record["teacher"]["operations"] == 2 * size * record["tokens_seen"]
    assert record["teacher"]["weights"] == record["provenance"]["fingerprints"]["teacher"]
    assert record["settings"]["objective"] == HALF
    card = (tmp_path / "out/README.md").read_text()
    assert f"| learned from | a teacher (weights {record['teacher']['weights'][:12]}); KL to it " in card


@pytest.mark.parametrize("how", ["lora", "all"])
def test_a_resumed_training_ends_with_the_same_weights(student, teacher, dataset, tmp_path, how):
    folders = tmp_path / "once", tmp_path / "twice"
    options = {"train": how, "max_steps": 4, "budget": {"unit": "max_steps", "amount": 4}}
    train(student, teacher, dataset, folders[0], **options)
    recover.finetune(request(student, teacher, dataset, folders[1], stop_share=0.5, **options))
    train(student, teacher, dataset, folders[1], **options)
    if how == "lora":
        once, twice = map(adapter_of, folders)
    else:
        once, twice = (models.load(models.Source(str(f / recover.MODEL))).state_dict() for f in folders)
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())


def test_the_tree_and_padded_rows_give_the_same_gradients(student, teacher, dataset, tmp_path):
    kind, found = kinds.named("causal-lm"), {}
    rows = [{"input_ids": [1, 5, 6, 7 + i % 3, 9 + i], "labels": [-100, -100, 6, 7 + i % 3, 9 + i]} for i in range(6)]
    section = Objective(ce=0.3, kl=0.7, divergence="js", beta=0.3)
    settings = recover.TrainingSettings.model_validate(SETTINGS)
    for arrangement in ("tree", "sorted"):
        model = models.load(models.Source(str(student)))
        how = settings.model_copy(update={"arrangement": arrangement})
        taught = distillation.load(models.Source(str(teacher)), kind, how, 64)
        engine = kind.engine(model, 64, arrangement)
        objective = distillation.Distillation(section, taught)
        assert objective.obstacle(engine) == ""
        loss = sum(objective.summed_loss(engine, micro) for micro in engine.micro_batches(rows))
        loss.backward()
        found[arrangement] = loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
        assert not any(p.requires_grad for p in taught.engine.forward.model.parameters())
    assert found["tree"][0] == pytest.approx(found["sorted"][0], rel=1e-5)
    assert torch.allclose(found["tree"][1], found["sorted"][1], atol=1e-4 * found["sorted"][1].abs().max().item())


def test_models_that_cap_their_logits_are_compared_by_these(tiny_checkpoint, student):
    """Cohere scales its logits after the output layer; the other model, a Llama, does not."""
    scaled = tiny_checkpoint("cohere", logit_scale=0.25, num_hidden_layers=2)
    kind, settings = kinds.named("causal-lm"), recover.TrainingSettings.model_validate(SETTINGS)
    rows = [{"input_ids": [1, 5, 6, 7, 9 + i], "labels": [-100, -100, 6, 7, 9 + i]} for i in range(3)]
    folders = [(scaled, student), (student, scaled)]
    for ours, theirs in folders:
        model = models.load(models.Source(str(ours)))
        taught = distillation.load(models.Source(str(theirs)), kind, settings, 64)
        engine = kind.engine(model, 64)
        objective = distillation.Distillation(Objective(ce=0, kl=1), taught)
        heads = [engine.forward.head is None, taught.engine.forward.head is None]
        assert sorted(heads) == [False, True]
        loss = sum(objective.summed_loss(engine, micro).item() for micro in engine.micro_batches(rows))
        expected = dense_loss(model, taught.engine.forward.model, rows, 0, 1, 1)
        assert loss / kind.targets(rows) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_must_be_exact_in_the_arrangement_of_the_student():
    class Arranged:
        def __init__(self, arrangement):
            self.arrangement = arrangement

    def obstacle(student, teacher):
        taught = distillation.Teacher(1, Arranged(teacher))
        return distillation.Distillation(Objective(kl=1), taught).obstacle(Arranged(student))

    assert "it needs sorted" in obstacle("tree", "sorted") and "it needs alone" in obstacle("sorted", "alone")
    assert not obstacle("sorted", "tree") and not obstacle("alone", "sorted") and not obstacle("tree", "tree")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_learn_from_a_teacher_too(tmp_path, name):
    kind = kinds.named("seq2seq")
    rows = [{"input_ids": [5 + i, 6, 2], "labels": [7, 8 + i, 9, 2][i % 2 :]} for i in range(5)]
    for place, seed in (("student", 0), ("teacher", 1)):
        tiny_seq2seq.save(tmp_path / place, name, seed)
    model = models.load(models.Source(str(tmp_path / "student")))
    settings = recover.TrainingSettings.model_validate(SETTINGS)
    taught = distillation.load(models.Source(str(tmp_path / "teacher")), kind, settings, 64)
    engine = kind.engine(model, 64)
    objective = distillation.Distillation(Objective(ce=0, kl=1), taught)
    loss = sum(objective.summed_loss(engine, micro).item() for micro in engine.micro_batches(rows))
    total = 0
    for row in rows:
        inputs = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        with torch.no_grad():
            pair = [one(**inputs).logits[0].double() for one in (model, taught.engine.forward.model)]
        s, t = (torch.log_softmax(logits, -1) for logits in pair)
        total += (t.exp() * (t - s)).sum().item()
    assert loss == pytest.approx(total, rel=1e-5)


def refused(message, *arguments, **more):
    with pytest.raises(SettingsError, match=message):
        recover.finetune(request(*arguments, **more))


def test_rejects_a_teacher_that_does_not_fit(student, teacher, tiny_checkpoint, dataset, tmp_path):
    refused("same weights as the student", student, student, dataset, tmp_path / "a")
    refused("no teacher", student, None, dataset, tmp_path / "b")
    resized = tiny_checkpoint("llama", vocab_size=136)
    refused("predicts 136 tokens and the student 128", student, resized, dataset, tmp_path / "c")
    tiny_seq2seq.save(tmp_path / "t5", "t5")
    refused("is a sequence-to-sequence model", student, tmp_path / "t5", dataset, tmp_path / "d")
    other = tiny_checkpoint("llama", intermediate_size=44)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w100"', '"v100"'))
    refused("has other tokens", student, other, dataset, tmp_path / "e")


def test_another_teacher_does_not_continue_the_training(student, teacher, tiny_checkpoint, dataset, tmp_path):
    first = train(student, teacher, dataset, tmp_path / "out", max_steps=2)
    other = tiny_checkpoint("llama", intermediate_size=44)
    second = train(student, other, dataset, tmp_path / "out", max_steps=2)
    # a training that is finished would be restored with its facts
    assert second["kl_to_teacher"]["before"] != first["kl_to_teacher"]["before"]
    assert second["teacher"]["parameters"] > first["teacher"]["parameters"]


def test_settings_without_a_teacher_are_recorded_as_before():
    section = recover.TrainingSettings.model_validate(SETTINGS)
    assert "objective" not in section.model_dump() and "objective" not in section.recorded("none")
    planned = recover.recovery_of(section)
    assert planned.operations(100) == 400
    distilled = section.model_copy(update={"objective": Objective(kl=1)})
    assert recover.recovery_of(distilled, recover.Teacher(150)).operations(100) == 400 + 2 * 150
