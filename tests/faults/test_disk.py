"""A disk that is full: a job says so in one sentence, and once there is room the study ends as if it had not been."""

import os
import shutil
import subprocess

import pytest
from disturbance import EVERY_STAGE

from tests.study.checkout import STUDY
from tests.study.outcome import differences, numbers

pytestmark = pytest.mark.slow

SIZE = 64 * 2**20

# what is taken back, so that a stage has to write again, and the bytes that are left for it
CASES = {
    "finetune": ("results/finetuned/Mistral/best_acc_finetuned", 150_000),
    "prune": ("results/candidates/Mistral/width-0.5-magnitude", 300_000),
    "evaluate": ("results/dense_evaluation/Mistral", 6_000),
}


@pytest.fixture
def on_a_small_disk(copied):
    """The finished study, its results on a disk of their own."""
    results, aside = copied.folder / "results", copied.folder / "aside"
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    results.rename(aside)
    results.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(results)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr}")
    try:
        shutil.copytree(aside, results, symlinks=True, dirs_exist_ok=True)
        yield copied
    finally:
        subprocess.run(["umount", str(results)], check=True)


def fill(folder, left):
    """Fill the disk of `folder` but for `left` bytes."""
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - left)
    return ballast


@pytest.mark.parametrize("stage", CASES)
def test_a_full_disk_stops_a_job_with_a_sentence_and_costs_nothing_else(on_a_small_disk, finished, stage):
    study = on_a_small_disk
    taken, left = CASES[stage]
    shutil.rmtree(study.folder / taken)
    ballast = fill(study.folder / "results", left)
    said = study.refused("--cores", "1", *EVERY_STAGE, config=STUDY)
    assert "no space is left" in said or "room" in said, said[-5000:]
    ballast.unlink()
    study.run("--cores", "2", *EVERY_STAGE, config=STUDY)
    assert differences(finished.numbers, numbers(study.folder)) == []
