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
from coppice.stages.recover import training
from coppice.stages.recover.engine import batching, checkpoints, processes, progress, sharding, trainer

# Dropout, so that the random state counts; several epochs, so that the order of the data does.
RESUMED = SETTINGS | {"lora": SETTINGS["lora"] | {"dropout": 0.2}, "max_steps": 12, "eval_steps": 3, "save_steps": 3}


def in_another_process(function, *arguments):
    """Exit code of `function` in a fork of this process, where torch is loaded already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def killed_after_step(step):
    def patch():
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        progress.TrainingLog.on_step_end = on_step_end

    return patch


def killed_in_a_checkpoint():
    """Half of the second checkpoint's optimizer state is written when the power fails."""
    real = torch.save

    def save(content, path, *arguments, **options):
        real(content, path, *arguments, **options)
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def killed_before_the_seal():
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
        pytest.param(killed_after_step(2), None, id="before any checkpoint", marks=pytest.mark.slow),
        pytest.param(killed_after_step(8), "checkpoint-6", id="between checkpoints", marks=pytest.mark.slow),
        pytest.param(killed_in_a_checkpoint, "checkpoint-3", id="inside a checkpoint"),
        pytest.param(killed_before_the_seal, "checkpoint-6", id="before its seal", marks=pytest.mark.slow),
    ],
)
def test_a_killed_training_ends_with_the_identical_adapter(
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


@pytest.fixture
def in_front():
    """As at a terminal: what runs in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("told", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_writes_a_checkpoint_and_the_rerun_ends_the_same(
    tiny_checkpoint, dataset, tmp_path, monkeypatch, told, in_front
):
    """SIGTERM is a scheduler's, SIGINT is Ctrl-C; a scheduler may follow up the one with the other."""
    folder = tiny_checkpoint("llama")
    train(folder, dataset, tmp_path / "whole", RESUMED)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            for number in told:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(progress.TrainingLog, "on_step_begin", on_step_begin)
    with pytest.raises(CoppiceError, match="stopped at step 5"):
        train(folder, dataset, tmp_path / "stopped", RESUMED)
    assert checkpoints.is_whole(tmp_path / "stopped/checkpoint-5")
    monkeypatch.undo()
    train(folder, dataset, tmp_path / "stopped", RESUMED)
    assert same_adapter(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_ctrl_c_ends_a_training_at_once(tiny_checkpoint, dataset, tmp_path, monkeypatch, in_front):
    def on_step_begin(self, args, state, control, **kwargs):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.TrainingLog, "on_step_begin", on_step_begin)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_checkpoint("llama"), dataset, tmp_path / "out", RESUMED)


def test_a_training_in_the_background_goes_on_at_ctrl_c(tiny_checkpoint, dataset, tmp_path, monkeypatch, in_front):
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.TrainingLog, "on_step_begin", on_step_begin)
    train(tiny_checkpoint("llama"), dataset, tmp_path / "out", RESUMED)


def test_a_finished_training_is_restored_without_a_step(tiny_checkpoint, dataset, tmp_path, monkeypatch):
    """Snakemake removes the declared files before a rerun: adapter, records and log come back from the checkpoints."""
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


def test_the_best_and_the_newest_checkpoint_stay(tiny_checkpoint, dataset, tmp_path):
    output = tmp_path / "out"
    record = train(tiny_checkpoint("llama"), dataset, output, RESUMED | {"learning_rate": 0.3, "eval_steps": 1})
    kept = {path.name for path in output.glob("checkpoint-*")}
    assert (output / "best").resolve().name == f"checkpoint-{record['best_step']}"
    assert kept == {f"checkpoint-{record['best_step']}", "checkpoint-12"}


def test_a_damaged_checkpoint_is_left_out(tiny_checkpoint, dataset, tmp_path, caplog):
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


def test_early_stopping_ends_a_training_that_gets_no_better(tiny_checkpoint, dataset, tmp_path):
    settings = RESUMED | {"early_stopping": 2, "eval_steps": 1, "learning_rate": 1.0, "max_steps": 60}
    record = train(tiny_checkpoint("llama"), dataset, tmp_path / "out", settings)
    assert record["steps"] == record["best_step"] + 2 < 60


def killed_before_it_says_it_is_finished():
    checkpoints.finish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


def killed_in_the_first_vain_evaluation_after(step):
    def patch():
        def on_save(self, args, state, control, **kwargs):
            real(self, args, state, control, **kwargs)
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        real, checkpoints.Seal.on_save = checkpoints.Seal.on_save, on_save

    return patch


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_training_killed_after_its_last_step_takes_no_other(tiny_checkpoint, dataset, tmp_path, schedule):
    folder, settings = tiny_checkpoint("llama"), RESUMED | {"max_steps": 10, "schedule": schedule}
    train(folder, dataset, tmp_path / "whole", settings)

    def train_until_killed():
        killed_before_it_says_it_is_finished()
        train(folder, dataset, tmp_path / "killed", settings)

    assert in_another_process(train_until_killed) == -signal.SIGKILL
    train(folder, dataset, tmp_path / "killed", settings)
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    assert same_adapter(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_early_stopping_counts_on_after_a_resume(tiny_checkpoint, dataset, tmp_path):
    settings = RESUMED | {"early_stopping": 3, "eval_steps": 1, "save_steps": 1, "learning_rate": 1.0, "max_steps": 60}
    folder = tiny_checkpoint("llama")
    whole = train(folder, dataset, tmp_path / "whole", settings)

    def train_until_killed():
        killed_in_the_first_vain_evaluation_after(whole["best_step"] + 2)()
        train(folder, dataset, tmp_path / "killed", settings)

    assert in_another_process(train_until_killed) == -signal.SIGKILL
    train(folder, dataset, tmp_path / "killed", settings)
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")


def test_settings_that_nothing_is_learnt_from_train_nothing_anew(tiny_checkpoint, dataset, tmp_path, monkeypatch):
    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    train(folder, dataset, output, RESUMED)
    monkeypatch.setattr(trainer.StepTrainer, "training_step", lambda *arguments: pytest.fail("a step was run"))
    train(folder, dataset, output, RESUMED | {"merge": True, "save_steps": 6, "seeds": [3, 4]})
    assert (output / "merged/model.safetensors").is_file()


def with_scarce_memory(limit):
    """`processes.run` with a second process that has memory for `limit` tokens."""
    real = processes.run
    return lambda function, arguments, world: real(
        scarce_memory_in_the_second_process, {"arguments": arguments, "limit": limit}, world
    )


def scarce_memory_in_the_second_process(arguments, limit):
    """In place of the training: the second process has less memory than the first."""
    real = batching.Engine.summed_loss

    def scarce(self, micro):
        if os.environ["RANK"] == "1" and micro.tokens > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory")
        return real(self, micro)

    batching.Engine.summed_loss = scarce
    training._train(**arguments)


@pytest.mark.slow
def test_little_memory_in_one_of_two_processes_changes_nothing(tiny_checkpoint, dataset, tmp_path, monkeypatch):
    folder = tiny_checkpoint("llama")
    one = train(folder, dataset, tmp_path / "one")
    monkeypatch.setattr(processes, "run", with_scarce_memory(limit=8))
    two = train(folder, dataset, tmp_path / "two", world=2)
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_end_where_one_does(tiny_checkpoint, dataset, tmp_path):
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
def test_processes_that_share_the_weights_learn_what_those_learn_that_do_not(tiny_checkpoint, dataset, tmp_path):
    """As for a model that does not fit one GPU: each process holds a part of the frozen weights."""
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
def test_little_memory_in_a_process_that_shares_the_weights_restarts_all(
    tiny_checkpoint, dataset, tmp_path, monkeypatch, caplog
):
    folder = tiny_checkpoint("llama")
    one = train(folder, dataset, tmp_path / "one")
    monkeypatch.setattr(processes, "run", with_scarce_memory(limit=16))
    two = train(folder, dataset, tmp_path / "two", SETTINGS | {"sharding": True, "micro_batch_size": 1}, world=2)
    assert "the processes start again with 16 tokens at a time" in caplog.text
    assert two["tokens_at_a_time"] == 16
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)


def test_memory_that_never_suffices_for_processes_that_share_the_weights_ends_in_advice(
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


def test_a_quantised_base_is_not_spread_over_processes(tiny_checkpoint):
    source = models.Source(path=str(tiny_checkpoint("llama")), quantize="4bit")
    with pytest.raises(SettingsError, match=r"finetune\.sharding.*device_map"):
        sharding.wanted(True, source, 2)
    assert not sharding.wanted(None, source, 2)
    assert not sharding.wanted(True, source, 1)


@pytest.mark.slow
def test_what_stops_one_of_two_processes_is_told(tiny_checkpoint, dataset, tmp_path):
    with pytest.raises(CoppiceError, match=r"batch_size.*2 processes"):
        train(tiny_checkpoint("llama"), dataset, tmp_path / "out", SETTINGS | {"batch_size": 1}, world=2)


def test_settings_that_come_back_find_their_checkpoints(tiny_checkpoint, dataset, tmp_path, monkeypatch):
    """A user who changes a setting, sees the training begin again and changes it back loses nothing."""
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
