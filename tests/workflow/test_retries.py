"""What `--retries` repeats, and what it does not: bad data is told once more and no time spent on it."""

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


def test_bad_data_is_read_once_and_mended_data_at_the_next_call(checkout):
    (checkout.folder / "bad.json").write_text("[]")
    config = {"datasets": "{alpaca: {path: ./bad.json, format: json}}"}
    command = ("--cores", "1", "--retries", "2", "resources/datasets/alpaca/dataset.json")
    done = checkout.snakemake(*command, config=config)
    assert done.returncode == 1
    assert done.stdout.count("Trying to restart job") == 2
    assert done.stdout.count("another attempt would fail alike") == 2
    (checkout.folder / "bad.json").write_text(BAD.replace('""', '"some words"'))
    checkout.run(*command, config=config)


def test_a_job_that_is_killed_is_tried_again_and_ends_well(checkout):
    module = checkout.folder / "workflow/scripts/coppice/miniature/prepare.py"
    module.write_text(module.read_text() + KILLED_ONCE)
    done = checkout.run("--cores", "1", "--retries", "2", "resources/miniature/ptb/dataset.json")
    assert done.stdout.count("Trying to restart job") == 1 and (checkout.folder / "attempted").exists()
