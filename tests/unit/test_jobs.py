"""Failed jobs: which failures another attempt can fix, and that the same run does not compute the others again."""

import errno
import json
import os
import subprocess
import sys

import pytest

from coppice.core import errors, jobs, locks, logs, records

# A job as the scripts run it: it notes that it computed, then fails as its argument says.
JOB = """
import sys
from coppice.core import errors, logs
with logs.job("job.log", status="status.json", title="finetune Tiny best_acc"):
    assert "torch" not in sys.modules
    with open("computed", "a") as file:
        file.write("x")
    exec(sys.argv[1])
"""
NAN = "raise errors.CoppiceError('the loss is nan at step 3')"


@pytest.fixture
def attempt(tmp_path):
    """Return `once(run, failure)`, which runs the job once and returns (exit status, stderr, times computed)."""

    def once(run, failure=NAN):
        environment = os.environ | {logs.RUN: run} if run else {k: v for k, v in os.environ.items() if k != logs.RUN}
        command = [sys.executable, "-c", JOB, failure]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stderr, len((tmp_path / "computed").read_text())

    return once


def test_computes_a_final_failure_once_a_run_and_repeats_its_message(attempt, tmp_path):
    assert attempt("first")[::2] == (1, 1)
    code, message, computed = attempt("first")
    assert (code, computed) == (1, 1)
    assert "the loss is nan at step 3" in message and "Not retried" in message
    assert "the loss is nan at step 3" in (tmp_path / "job.log").read_text()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_the_next_run_tries_again(attempt):
    attempt("first")
    assert attempt("second", "pass")[::2] == (0, 2)
    assert attempt("second", "pass")[::2] == (0, 3), "a job that succeeded has not failed"


@pytest.mark.parametrize(
    "failure",
    [
        "raise errors.TransientError('out of memory at step 3')",
        "raise MemoryError",
        "raise RuntimeError('a defect')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_retries_a_failure_that_more_memory_or_another_machine_may_fix(attempt, failure):
    assert attempt("first", failure)[0] != 0
    assert attempt("first", "pass")[::2] == (0, 2)


def test_always_computes_a_job_outside_any_run(attempt):
    assert attempt(None)[2] == 1 and attempt(None)[2] == 2


def test_a_job_without_a_status_path_keeps_its_status_beside_its_log(tmp_path):
    code = 'from coppice.core import logs\nwith logs.job("fetch.M.1.log"): pass'
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=600)
    assert json.loads((tmp_path / "fetch.M.1.status.json").read_text())["state"] == "done"


def test_an_interrupted_job_says_that_it_was_stopped(attempt, tmp_path):
    in_foreground = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code, message, _ = attempt("first", f"{in_foreground}; os.kill(os.getpid(), signal.SIGINT)")
    assert code == 130 and message.count("\n") == 1 and message.startswith("stopped by an interrupt")
    assert "Traceback" not in (tmp_path / "job.log").read_text()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    assert attempt("first", "pass")[::2] == (0, 2), "the same run may go on"


def test_a_training_that_was_asked_to_stop_has_not_failed(attempt, tmp_path):
    assert attempt("first", "raise errors.Stopped('finetune: stopped at step 5')")[0] == 1
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"


def test_interrupting_a_waiting_process_keeps_the_status_of_the_running_one(attempt, tmp_path):
    attempt("first", "pass")
    before = (tmp_path / "status.json").read_text()
    waiting = f"import signal; signal.alarm(2); signal.signal(signal.SIGALRM, signal.default_int_handler)\n{JOB}"
    with locks.alone(tmp_path / "job.log"):
        done = subprocess.run([sys.executable, "-c", waiting, "pass"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert (tmp_path / "status.json").read_text() == before


@pytest.mark.parametrize(
    ("before", "named"),
    [
        ("", ".job.log.lock"),  # nothing can be written, from the start
        ("import os; os.symlink('/dev/full', 'job.log')", "job.log"),  # the disk of the log is full
    ],
)
def test_names_a_log_that_cannot_be_written(tmp_path, before, named):
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"  # no file may hold a byte
    job = f"{before or small}\n{JOB}"
    command = [sys.executable, "-c", job, "print('a warning', file=sys.stderr, flush=True)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{named}: "), done.stderr


def test_rejects_python_without_docstrings_before_loading_a_checkpoint(tmp_path):
    job = 'from coppice.core import jobs\nwith jobs.computing("a.log", None, "", 1, {}): pass'
    for level, status in (("1", 0), ("2", 1)):
        environment = os.environ | {"PYTHONOPTIMIZE": level}
        command = [sys.executable, "-c", job]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == status
    assert "Unset PYTHONOPTIMIZE" in done.stderr and "Traceback" not in done.stderr


def test_every_call_of_snakemake_is_a_new_run(monkeypatch):
    monkeypatch.setenv(logs.RUN, "of an outer snakemake")
    jobs.begin_run()
    first = os.environ[logs.RUN]
    jobs.begin_run()
    assert len({first, os.environ[logs.RUN], "of an outer snakemake"}) == 3


def caused(error, cause):
    try:
        try:
            raise cause
        except Exception:
            raise error from None
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (errors.SettingsError("an unknown key"), True),
        (caused(errors.DataError("not there"), FileNotFoundError(errno.ENOENT, "no such file")), True),
        (caused(errors.CheckpointError("no weights in it"), OSError("no file named model.safetensors")), True),
        (caused(errors.DataError("cannot be read"), OSError(errno.ESTALE, "stale file handle")), False),
        (caused(errors.CheckpointError("does not load"), RuntimeError("CUDA out of memory. Tried to")), False),
        (caused(errors.CheckpointError("does not load"), RuntimeError("size mismatch for weight")), True),
        (caused(errors.CheckpointError("does not load"), RuntimeError("No CUDA GPUs are available")), False),
        (caused(errors.CheckpointError("does not load"), RuntimeError("CUDA unknown error - this may be")), False),
        (caused(errors.DataError("cannot be read"), OSError("stale file handle (os error 116)")), False),
        (caused(errors.DataError("cannot be read"), OSError("not there (os error 2)")), True),
        (caused(errors.DataError("too large"), MemoryError()), False),
        (errors.TransientError("told to stop"), False),
        (ValueError("a defect"), False),
    ],
)
def test_a_failure_is_final_if_only_the_user_can_fix_it(error, final):
    assert errors.is_final(error) is final


def test_a_missing_record_is_not_a_final_failure(tmp_path):
    with pytest.raises(records.RecordError, match="does not exist") as raised:
        records.read(tmp_path / "a.json")
    assert not errors.is_final(raised.value)


def test_recognizes_torchs_message_for_a_lack_of_memory():
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert not errors.is_final(caused(errors.CheckpointError("does not load"), raised.value))
