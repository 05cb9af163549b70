"""What `--retries` repeats and what it does not: a job that fails on bad data only repeats its message."""

import pytest

pytestmark = pytest.mark.slow
BAD = '{"instruction": "", "input": "", "output": ""}\n'
KILLED_ONCE = """
from pathlib import Path as _Path
if not _Path("attempted").exists():
    _Path("attempted").touch()
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
"""


@pytest.fixture(scope="module")
def checkout(new_checkout):
    return new_checkout("retries")


def test_reads_bad_data_once_and_corrected_data_in_the_next_run(checkout):
    (checkout.folder / "bad.json").write_text("[]")
    config = {"datasets": "{alpaca: {path: ./bad.json, format: json}}"}
    command = ("--cores", "1", "--retries", "2", "resources/datasets/alpaca/dataset.json")
    done = checkout.snakemake(*command, config=config)
    assert done.returncode == 1
    assert done.stdout.count("Trying to restart job") == 2
    assert done.stdout.count("Not retried") == 2
    (checkout.folder / "bad.json").write_text(BAD.replace('""', '"some words"'))
    checkout.run(*command, config=config)


def test_retries_a_killed_job(checkout):
    module = checkout.folder / "workflow/scripts/coppice/miniature/prepare.py"
    module.write_text(module.read_text() + KILLED_ONCE)
    done = checkout.run("--cores", "1", "--retries", "2", "resources/miniature/ptb/dataset.json")
    assert done.stdout.count("Trying to restart job") == 1 and (checkout.folder / "attempted").exists()
