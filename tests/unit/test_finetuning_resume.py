"""A training that is killed, stopped or run in several processes ends with the adapter of an undisturbed one."""

import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_finetuning import SETTINGS, adapter_of, train
from test_finetuning import dataset as dataset

from coppice import models
from coppice.core import records
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import packing
from coppice.stages.recover import training
from coppice.stages.recover.engine import checkpoints, processes, progress, sharding, trainer

# Dropout makes the random state matter, several epochs the order of the data.
RESUMED = SETTINGS | {"lora": SETTINGS["lora"] | {"dropout": 0.2}, "max_steps": 12, "eval_steps": 3, "save_steps": 3}


def in_another_process(function, *arguments):
    """Run `function` in a fork of this process, which has already loaded torch; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def kill_after_step(step):
    def patch():
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        progress.TrainingLog.on_step_end = on_step_end

    return patch


def kill_in_a_checkpoint():
    """Kill the process when half of the second checkpoint's optimizer state is written, like a power failure."""
    real = torch.save

    def save(content, path, *arguments, **options):
        real(content, path, *arguments, **options)
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def kill_before_the_seal():
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, args, state, control, **kwargs)

    real, checkpoints.Seal.on_save = checkpoints.Seal.on_save, on_save


def same_adapter(first, second):
    expected, found = adapter_of(first), adapter_of(second)
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)


def comparable(folder):
    record = records.read(folder / "finetuning_config.json")
    return {key: value for key, value in record.items() if key not in TIMED}


TIMED = ("seconds", "tokens_per_second", "peak_memory_bytes", "provenance", "checksum")


@pytest.mark.parametrize(
    ("patch", "resumed_from"),
    [
        pytest.param(kill_after_step(2), None, id="before any checkpoint", marks=pytest.mark.slow),
        pytest.param(kill_after_step(8), "checkpoint-6", id="between checkpoints", marks=pytest.mark.slow),
        pytest.param(kill_in_a_checkpoint, "checkpoint-3", id="inside a checkpoint"),
        pytest.param(kill_before_the_seal, "checkpoint-6", id="before its seal", marks=pytest.mark.slow),
    ],
)
def test_a_killed_training_resumes_to_the_identical_adapter(
    tiny_checkpoint, dataset, tmp_path, caplog, patch, resumed_from
):
    folder = tiny_checkpoint("llama")
    train(folder, dataset, tmp_path / "whole", RESUMED)

    def train_until_killed():
        patch()
        train(folder, dataset, tmp_path / "killed", RESUMED)

    assert in_another_process(train_until_killed) == -signal.SIGKILL
    assert not (tmp_path / "killed/finetuning_config.json").exists()
    caplog.set_level("INFO")
    train(folder, dataset, tmp_path / "killed", RESUMED)
    assert (f"continuing from {resumed_from}" in caplog.text) if resumed_from else "continuing" not in caplog.text
    assert same_adapter(tmp_path / "whole", tmp_path / "killed")
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "killed")
    said = [line for line in (tmp_path / "killed/training_log.txt").read_text().splitlines() if "resumed" in line]
    step = resumed_from and resumed_from.rpartition("-")[2]
    assert [line.split("/")[0].strip() for line in said] == ([step] if step else [])


@pytest.fixture
def in_foreground():
    """Handle Ctrl-C as at a terminal: processes in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_writes_a_checkpoint_from_which_a_rerun_ends_the_same(
    tiny_checkpoint, dataset, tmp_path, monkeypatch, signals, in_foreground
):
    """A scheduler sends SIGTERM, Ctrl-C sends SIGINT; a scheduler may send SIGTERM after a SIGINT."""
    folder = tiny_checkpoint("llama")
    train(folder, dataset, tmp_path / "whole", RESUMED)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            for number in signals:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(progress.TrainingLog, "on_step_begin", on_step_begin)
    with pytest.raises(CoppiceError, match="stopped at step 5"):
        train(folder, dataset, tmp_path / "stopped", RESUMED)
    assert checkpoints.is_whole(tmp_path / "stopped/checkpoint-5")
    monkeypatch.undo()
    train(folder, dataset, tmp_path / "stopped", RESUMED)
    assert same_adapter(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_ctrl_c_stops_a_training_at_once(tiny_checkpoint, dataset, tmp_path, monkeypatch, in_foreground):
    def on_step_begin(self, args, state, control, **kwargs):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.TrainingLog, "on_step_begin", on_step_begin)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_checkpoint("llama"), dataset, tmp_path / "out", RESUMED)


def test_a_training_in_the_background_ignores_ctrl_c(tiny_checkpoint, dataset, tmp_path, monkeypatch, in_foreground):
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.TrainingLog, "on_step_begin", on_step_begin)
    train(tiny_checkpoint("llama"), dataset, tmp_path / "out", RESUMED)


def test_restores_a_finished_training_without_a_step(tiny_checkpoint, dataset, tmp_path, monkeypatch):
    """Snakemake deletes declared outputs before a rerun: adapter, records and log come back from the checkpoints."""
    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    train(folder, dataset, output, RESUMED)
    shutil.copytree(output, tmp_path / "before", symlinks=True)
    for name in ("adapter_model.safetensors", "finetuning_config.json", "training_log.txt", "training_state.json"):
        (output / name).unlink()
    monkeypatch.setattr(trainer.StepTrainer, "training_step", lambda *arguments: pytest.fail("a step was run"))
    train(folder, dataset, output, RESUMED)
    assert same_adapter(tmp_path / "before", output)
    assert comparable(tmp_path / "before") == comparable(output)
    assert records.read(tmp_path / "before/training_state.json") == records.read(output / "training_state.json")
    steps = [line.split()[0] for line in (output / "training_log.txt").read_text().splitlines()[1:]]
    assert steps[-1] == "12/12"


def test_keeps_the_best_and_the_newest_checkpoint(tiny_checkpoint, dataset, tmp_path):
    output = tmp_path / "out"
    record = train(tiny_checkpoint("llama"), dataset, output, RESUMED | {"learning_rate": 0.3, "eval_steps": 1})
    kept = {path.name for path in output.glob("checkpoint-*")}
    assert (output / "best").resolve().name == f"checkpoint-{record['best_step']}"
    assert kept == {f"checkpoint-{record['best_step']}", "checkpoint-12"}


def test_skips_a_damaged_checkpoint(tiny_checkpoint, dataset, tmp_path, caplog):
    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    train(folder, dataset, output, RESUMED)
    expected = adapter_of(output)
    (output / checkpoints.FINISHED).unlink()
    newest = max(output.glob("checkpoint-*"), key=checkpoints.step_of)
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    train(folder, dataset, output, RESUMED)
    assert f"{newest.name} was cut off" in caplog.text
    assert all(torch.equal(expected[name], tensor) for name, tensor in adapter_of(output).items())


def test_early_stopping_ends_a_training_that_does_not_improve(tiny_checkpoint, dataset, tmp_path):
    settings = RESUMED | {"early_stopping": 2, "eval_steps": 1, "learning_rate": 1.0, "max_steps": 60}
    record = train(tiny_checkpoint("llama"), dataset, tmp_path / "out", settings)
    assert record["steps"] == record["best_step"] + 2 < 60


def kill_before_it_is_marked_as_finished():
    checkpoints.finish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


def kill_after_saving_step(step):
    def patch():
        def on_save(self, args, state, control, **kwargs):
            real(self, args, state, control, **kwargs)
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        real, checkpoints.Seal.on_save = checkpoints.Seal.on_save, on_save

    return patch


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_training_killed_after_its_last_step_takes_no_further_step(tiny_checkpoint, dataset, tmp_path, schedule):
    folder, settings = tiny_checkpoint("llama"), RESUMED | {"max_steps": 10, "schedule": schedule}
    train(folder, dataset, tmp_path / "whole", settings)

    def train_until_killed():
        kill_before_it_is_marked_as_finished()
        train(folder, dataset, tmp_path / "killed", settings)

    assert in_another_process(train_until_killed) == -signal.SIGKILL
    train(folder, dataset, tmp_path / "killed", settings)
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    assert same_adapter(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_early_stopping_keeps_its_count_after_a_resume(tiny_checkpoint, dataset, tmp_path):
    settings = RESUMED | {"early_stopping": 3, "eval_steps": 1, "save_steps": 1, "learning_rate": 1.0, "max_steps": 60}
    folder = tiny_checkpoint("llama")
    whole = train(folder, dataset, tmp_path / "whole", settings)

    def train_until_killed():
        kill_after_saving_step(whole["best_step"] + 2)()
        train(folder, dataset, tmp_path / "killed", settings)

    assert in_another_process(train_until_killed) == -signal.SIGKILL
    train(folder, dataset, tmp_path / "killed", settings)
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")


def test_does_not_train_again_after_a_change_of_settings_that_do_not_affect_training(
    tiny_checkpoint, dataset, tmp_path, monkeypatch
):
    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    train(folder, dataset, output, RESUMED)
    monkeypatch.setattr(trainer.StepTrainer, "training_step", lambda *arguments: pytest.fail("a step was run"))
    train(folder, dataset, output, RESUMED | {"merge": True, "save_steps": 6, "seeds": [3, 4]})
    assert (output / "merged/model.safetensors").is_file()


def with_scarce_memory(limit):
    """Return a `processes.run` whose second process has memory for `limit` tokens."""
    real = processes.run
    return lambda function, arguments, world: real(
        train_with_scarce_memory_in_the_second_process, {"arguments": arguments, "limit": limit}, world
    )


def train_with_scarce_memory_in_the_second_process(arguments, limit):
    """Train with less memory in the second process than in the first."""
    real = packing.Engine.summed_loss

    def scarce(self, micro):
        if os.environ["RANK"] == "1" and micro.tokens > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory")
        return real(self, micro)

    packing.Engine.summed_loss = scarce
    training._train(**arguments)


@pytest.mark.slow
def test_scarce_memory_in_one_of_two_processes_changes_no_result(tiny_checkpoint, dataset, tmp_path, monkeypatch):
    folder = tiny_checkpoint("llama")
    one = train(folder, dataset, tmp_path / "one")
    monkeypatch.setattr(processes, "run", with_scarce_memory(limit=8))
    two = train(folder, dataset, tmp_path / "two", world=2)
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_end_with_the_result_of_one(tiny_checkpoint, dataset, tmp_path):
    folder = tiny_checkpoint("llama")
    settings = SETTINGS | {"micro_batch_size": 1, "data": SETTINGS["data"] | {"cutoff_len": 12}}
    one = train(folder, dataset, tmp_path / "one", settings)
    two = train(folder, dataset, tmp_path / "two", settings, world=2)
    assert two["processes"] == 2 and two["steps"] == one["steps"]
    assert two["tokens_seen"] == one["tokens_seen"]
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    expected, found = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert all(torch.allclose(expected[name], tensor, atol=1e-4) for name, tensor in found.items())


@pytest.mark.slow
def test_sharded_processes_learn_the_same_as_unsharded_ones(tiny_checkpoint, dataset, tmp_path):
    """As for a model that does not fit on one GPU, each process holds a part of the frozen weights."""
    folder = tiny_checkpoint("qwen2")
    settings = SETTINGS | {"micro_batch_size": 1, "data": SETTINGS["data"] | {"cutoff_len": 12}, "merge": True}
    settings |= {"gradient_checkpointing": True, "lora": SETTINGS["lora"] | {"use_dora": True, "bias": "all"}}
    apart = train(folder, dataset, tmp_path / "apart", settings, world=2)
    shared = train(folder, dataset, tmp_path / "shared", settings | {"sharding": True}, world=2)
    assert shared["sharded"] and not apart["sharded"]
    assert shared["validation_loss"] == pytest.approx(apart["validation_loss"], rel=1e-6)
    for file in ("adapter_model.safetensors", "merged/model.safetensors"):
        expected, found = (load_file(tmp_path / output / file) for output in ("apart", "shared"))
        assert expected.keys() == found.keys()
        assert all(torch.allclose(expected[name], tensor, atol=1e-5) for name, tensor in found.items())


@pytest.mark.slow
def test_scarce_memory_in_a_sharded_process_restarts_all(tiny_checkpoint, dataset, tmp_path, monkeypatch, caplog):
    folder = tiny_checkpoint("llama")
    one = train(folder, dataset, tmp_path / "one")
    monkeypatch.setattr(processes, "run", with_scarce_memory(limit=16))
    two = train(folder, dataset, tmp_path / "two", SETTINGS | {"sharding": True, "micro_batch_size": 1}, world=2)
    assert "the processes start again with 16 tokens at a time" in caplog.text
    assert two["tokens_at_a_time"] == 16
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)


def test_sharded_processes_that_never_have_enough_memory_fail_with_advice(
    tiny_checkpoint, dataset, tmp_path, monkeypatch
):
    limits = []

    def run(function, arguments, world):
        limits.append(arguments["job"].token_limit)
        raise sharding.OutOfMemory("out of memory at step 1")

    monkeypatch.setattr(processes, "run", run)
    with pytest.raises(CoppiceError, match=r"out of memory at step 1, with 16 tokens .*gradient_checkpointing: true"):
        train(tiny_checkpoint("llama"), dataset, tmp_path, SETTINGS | {"sharding": True}, world=2)
    assert limits == [128, 64, 32, 16]


def test_does_not_shard_a_quantized_base(tiny_checkpoint):
    source = models.Source(path=str(tiny_checkpoint("llama")), quantize="4bit")
    with pytest.raises(SettingsError, match=r"finetune\.sharding.*device_map"):
        sharding.wanted(True, source, 2)
    assert not sharding.wanted(None, source, 2)
    assert not sharding.wanted(True, source, 1)


@pytest.mark.slow
def test_reports_the_error_of_one_of_two_processes(tiny_checkpoint, dataset, tmp_path):
    with pytest.raises(CoppiceError, match=r"batch_size.*2 processes"):
        train(tiny_checkpoint("llama"), dataset, tmp_path / "out", SETTINGS | {"batch_size": 1}, world=2)


def test_restored_settings_find_their_checkpoints(tiny_checkpoint, dataset, tmp_path, monkeypatch):
    """A user who changes a setting, sees the training start over and changes it back loses nothing."""
    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    train(folder, dataset, output, RESUMED)
    expected = adapter_of(output)

    def stop(*arguments):
        raise CoppiceError("a step was run")

    monkeypatch.setattr(trainer.StepTrainer, "training_step", stop)
    with pytest.raises(CoppiceError, match="a step was run"):
        train(folder, dataset, output, RESUMED | {"learning_rate": 1e-3})
    assert not list(output.glob("checkpoint-*"))
    train(folder, dataset, output, RESUMED)
    assert all(torch.equal(expected[name], tensor) for name, tensor in adapter_of(output).items())
    assert (output / "best").is_dir() and not list(output.glob("superseded-*"))
