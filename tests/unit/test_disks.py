"""What killed jobs leave behind is removed, what is being written stays; messages for a full disk and a running job."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coppice.core import disks, records

PACKAGE = str(Path(records.__file__).parents[2])
WRITER = """
import sys, time
from coppice.core import records
with records.atomic(sys.argv[1]) as file:
    file.write("half")
    file.flush()
    print("here", flush=True)
    time.sleep(60)
"""
WORKER = """
import sys
from coppice.core import logs
with logs.job(sys.argv[1], 1, sys.argv[2], "finetune A b"):
    print("at work", flush=True)
    if sys.argv[3:]:
        sys.stdin.read()
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": PACKAGE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_removes_what_a_killed_process_was_writing_but_not_what_a_living_one_writes(tmp_path):
    writers = [start(WRITER, tmp_path / name) for name in ("killed", "alive")]
    for writer in writers:
        assert writer.stdout.readline() == "here\n"
    writers[0].kill()
    writers[0].wait()
    assert len(disks.sweep([tmp_path])) == 1
    assert len(list(tmp_path.iterdir())) == 1
    writers[1].kill()
    writers[1].wait()
    disks.sweep([tmp_path])
    assert not list(tmp_path.iterdir())


def test_removes_a_half_written_checkpoint_with_its_content(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = tmp_path / disks.partial_name().replace(str(os.getpid()), str(gone.pid))
    folder = folder.with_name(f"{folder.name}model")
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "model.safetensors").write_bytes(b"0" * 100)
    assert disks.sweep([tmp_path]) == [folder] and not folder.exists()


def test_keeps_what_another_machine_writes_for_a_day(tmp_path):
    path = tmp_path / ".partial-another-1-x"
    path.write_text("half")
    assert not disks.sweep([tmp_path])
    os.utime(path, (time.time() - 25 * 3600,) * 2)
    assert disks.sweep([tmp_path]) == [path]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a/b"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    ],
)
def test_explains_a_full_disk(error):
    words = disks.explained(error, ["results"])
    assert "disk is full" in words and "run the same command again" in words
    assert disks.explained(ValueError("[Errno 2] no such file"), ["results"]) is None


def limit_file_size():
    """Keep every file of this process below 64 KB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


@pytest.mark.parametrize("writer", ["record", "safetensors", "torch"])
def test_explains_a_full_disk_whichever_library_writes(tmp_path, writer):
    """The writing process is a fork whose files cannot grow."""
    read, write = os.pipe()
    if not os.fork():
        limit_file_size()
        content = torch.zeros(100_000)
        try:
            if writer == "record":
                records.write(tmp_path / "a.json", {"x": "0" * 100_000})
            elif writer == "safetensors":
                save_file({"x": content}, tmp_path / "a.safetensors")
            else:
                torch.save(content, tmp_path / "a.pt")
        except Exception as error:
            os.write(write, (disks.explained(error, [str(tmp_path)]) or f"not told: {error!r}").encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    assert "run the same command again" in message, message
    assert not (tmp_path / "a.json").exists() and not disks.sweep([tmp_path])


def test_a_job_goes_on_if_its_status_cannot_be_written(tmp_path):
    (tmp_path / "status").write_text("a file where a folder should be")
    done = start(WORKER, tmp_path / "job.log", tmp_path / "status" / "x.json")
    assert done.wait() == 0, done.stderr.read()
    assert "cannot write the status file" in (tmp_path / "job.log").read_text()


def test_only_one_process_at_a_time_runs_a_job(tmp_path):
    first = start(WORKER, tmp_path / "job.log", tmp_path / "status.json", "until told")
    assert first.stdout.readline() == "at work\n"
    second = start(WORKER, tmp_path / "job.log", tmp_path / "status.json")
    line = second.stderr.readline()
    assert f"process {first.pid} on " in line and "holds this job's lock" in line
    first.stdin.close()
    assert second.stdout.readline() == "at work\n"
    assert first.wait() == 0 and second.wait() == 0


def test_a_killed_job_does_not_block_the_next_one(tmp_path):
    first = start(WORKER, tmp_path / "job.log", tmp_path / "status.json", "until told")
    assert first.stdout.readline() == "at work\n"
    first.kill()
    second = start(WORKER, tmp_path / "job.log", tmp_path / "status.json")
    assert second.wait() == 0 and "holds this job's lock" not in second.stderr.read()
