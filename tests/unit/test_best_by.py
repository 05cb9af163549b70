"""The best checkpoint by a metric of the validation rows: which it is, and that a resumed training chooses the same."""

import os

import pytest
import torch
from safetensors.torch import load_file

from coppice import data, models
from coppice.core import records
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import generating, kinds
from coppice.models.kinds import Decoding, Validator
from coppice.stages import recover
from coppice.stages.recover import examples
from coppice.stages.recover.engine import progress
from coppice.stages.recover.engine.best_by import BestBy, Found
from coppice.stats import text_metrics
from tests.unit import tiny_seq2seq

KIND = kinds.named("seq2seq")
METRIC = "eval_edit_similarity"
SETTINGS = {
    "data": {"dataset": "mine", "val_size": 8, "cutoff_len": 64},
    "lora": {
        "r": 4,
        "alpha": 8,
        "dropout": 0.2,
        "target_modules": "attention",
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init": "default",
    },
    "max_steps": 12,
    "learning_rate": 0.02,
    "batch_size": 8,
    "warmup_steps": 1,
    "eval_steps": 3,
    "save_steps": 3,
    "best_by": "edit_similarity",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_seq2seq.save(tmp_path_factory.mktemp("t5"), "flan-t5")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Return the record of rows with two captions of one word each."""
    folder = tmp_path_factory.mktemp("mine")
    rows = [
        {"prompt": f"w{10 + i % 60} w{20 + i % 7}", "captions": [f"w{70 + i % 3}", f"w{74 + i % 2}"]} for i in range(40)
    ]
    data.write("mine", {"train": rows}, folder)
    return str(folder / "dataset.json")


def train(checkpoint, dataset, output, world=1, **changes):
    settings = recover.TrainingSettings.model_validate(SETTINGS | changes)
    identity, source = {"model": "M", "candidate": "one"}, models.Source(str(checkpoint))
    request = recover.TrainingRequest(
        identity, source, {"mine": dataset}, settings, "none", output, seed=3, world=world
    )
    recover.finetune(request)
    return records.read(output / "training_state.json")


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def values(state):
    return [
        (entry["step"], entry["eval_edit_similarity"]) for entry in state["history"] if "eval_edit_similarity" in entry
    ]


def test_the_metric_is_that_of_the_answers_to_the_rows_that_are_held_out(checkpoint, dataset, tmp_path):
    state = train(checkpoint, dataset, tmp_path / "out")
    measured = dict(values(state))
    assert list(measured) == [3, 6, 9, 12] and len(set(measured.values())) > 1
    assert state["best_by"]["best"] == max(measured.values()) == measured[state["best_step"]]
    reader = models.Reader(tiny_seq2seq.tokenizer())
    settings = recover.TrainingSettings.model_validate(SETTINGS)
    rows = examples.to_ask({"mine": dataset}, settings.data, "none", reader, 3, KIND)
    assert len(rows) == 8 and all(len(row.references) == 2 for row in rows)
    model = models.load(models.Source(str(checkpoint)), tmp_path / "out")
    answers = KIND.answers(model, reader, rows, Decoding(new_tokens=2))
    right = text_metrics.score("edit_similarity", answers, [row.references for row in rows], text_metrics.CAPTIONS)
    assert right.value == pytest.approx(state["best_by"]["best"], rel=1e-12)
    assert f"edit_similarity {measured[12]:.4f}" in (tmp_path / "out/training_log.txt").read_text()


def scripted(monkeypatch, *script):
    """Let the metric take these values, one after another."""
    left = iter(script)
    fake = Validator(True, lambda kind, model, reader, rows, how: [None] * len(rows), lambda outputs, rows: next(left))
    monkeypatch.setitem(generating.VALIDATORS, "edit_similarity", fake)


def test_of_equal_values_the_earlier_step_is_the_best(checkpoint, dataset, tmp_path, monkeypatch):
    scripted(monkeypatch, 0.2, 0.5, 0.5, 0.1)
    state = train(checkpoint, dataset, tmp_path / "out", save_steps=100)
    assert state["best_step"] == 6 and state["best_by"] == {"metric": "edit_similarity", "first": 0.2, "best": 0.5}
    losses = {entry["step"]: entry["eval_loss"] for entry in state["history"] if "eval_loss" in entry}
    assert state["validation_loss"] == losses[6]
    assert os.readlink(tmp_path / "out/best") == "checkpoint-6"
    assert equal(tensors(tmp_path / "out"), tensors(tmp_path / "out/checkpoint-6"))


def test_training_stops_early_when_the_metric_does_not_rise(checkpoint, dataset, tmp_path, monkeypatch):
    scripted(monkeypatch, 0.2, 0.5, 0.5, 0.1, 0.9)
    state = train(checkpoint, dataset, tmp_path / "out", max_steps=30, early_stopping=2)
    assert [step for step, _ in values(state)] == [3, 6, 9, 12] and state["best_step"] == 6


def test_warns_of_a_metric_that_never_rises(checkpoint, dataset, tmp_path, monkeypatch):
    scripted(monkeypatch, 0.5, 0.4, 0.3, 0.5)
    state = train(checkpoint, dataset, tmp_path / "out")
    assert (
        "the validation edit_similarity never rose above its first value (first 0.5000, best 0.5000)"
        in state["warnings"]
    )


def test_a_training_that_is_stopped_and_resumed_ends_with_the_same_tensors_and_history(
    checkpoint, dataset, tmp_path, monkeypatch
):
    whole = train(checkpoint, dataset, tmp_path / "whole")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), 15)

    with monkeypatch.context() as patched:
        patched.setattr(progress.TrainingLog, "on_step_begin", on_step_begin)
        with pytest.raises(CoppiceError, match="stopped at step 8"):
            train(checkpoint, dataset, tmp_path / "stopped")
    resumed = train(checkpoint, dataset, tmp_path / "stopped")
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "stopped"))
    assert values(resumed) == values(whole) and resumed["best_step"] == whole["best_step"]
    assert equal(*(tensors(tmp_path / run / "best") for run in ("whole", "stopped")))


@pytest.mark.slow
def test_two_processes_choose_the_checkpoint_of_one(checkpoint, dataset, tmp_path):
    lora = SETTINGS["lora"] | {"dropout": 0.0}
    one = train(checkpoint, dataset, tmp_path / "one", lora=lora)
    two = train(checkpoint, dataset, tmp_path / "two", world=2, lora=lora)
    assert values(one) == values(two) and one["best_step"] == two["best_step"]
    first, second = (tensors(tmp_path / run) for run in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5)


def test_answers_can_be_generated_while_activations_are_computed_again(checkpoint, dataset, tmp_path):
    state = train(checkpoint, dataset, tmp_path / "out", gradient_checkpointing=True, max_steps=6)
    assert len(values(state)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_by": "bleu5"}, r"best_by: is bleu5, but a sequence-to-sequence model offers null \(the validation"),
        ({"data": SETTINGS["data"] | {"val_size": 0}}, "no row is held out"),
    ],
)
def test_refuses_a_metric_that_cannot_be_measured(checkpoint, dataset, tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        train(checkpoint, dataset, tmp_path / "out", **changes)


def test_the_direction_decides_what_is_better():
    history = [{"eval_loss": 3.0, "eval_x": 0.1, "step": 1}, {"eval_loss": 1.0, "eval_x": 0.4, "step": 2}]
    history += [{"eval_loss": 1.0, "eval_x": 0.4, "step": 3}, {"loss": 1.0, "step": 3}]
    assert BestBy().found(history) == Found(3.0, 1.0, 2, 1.0, 3.0)
    assert BestBy("x", True).found(history) == Found(0.1, 0.4, 2, 1.0, 3.0)
    assert BestBy("x", False).found(history) == Found(0.1, 0.1, 1, 3.0, 3.0)
    assert BestBy("x", True).better(0.2, None) and not BestBy("x", True).better(0.2, 0.2)
    assert BestBy().found([]) == Found()
