"""A full disk: the job fails with a message, and once there is room the study ends with the same results."""

import os
import shutil
import subprocess

import pytest
from disturbance import EVERY_STAGE

from tests.study.checkout import STUDY
from tests.study.outcome import differences, numbers

pytestmark = pytest.mark.slow

SIZE = 64 * 2**20

# stage -> the folder to delete, so that the stage writes it again, and the bytes to leave free for it
CASES = {
    "finetune": ("results/by_candidate/Mistral/depth-0.34/finetuned", 150_000),
    "prune": ("results/candidates/Mistral/width-0.5-magnitude", 300_000),
    "evaluate": ("results/dense_evaluation/Mistral", 6_000),
}


@pytest.fixture
def study_on_a_small_disk(study_copy):
    """Move the results of the finished study to a separate small disk."""
    results, aside = study_copy.folder / "results", study_copy.folder / "aside"
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
        yield study_copy
    finally:
        subprocess.run(["umount", str(results)], check=True)


def fill(folder, left):
    """Fill the disk of `folder` except for `left` bytes."""
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - left)
    return ballast


@pytest.mark.parametrize("stage", CASES)
def test_a_full_disk_fails_one_job_with_a_message_and_a_rerun_completes_it(study_on_a_small_disk, finished, stage):
    study = study_on_a_small_disk
    deleted, left = CASES[stage]
    shutil.rmtree(study.folder / deleted)
    ballast = fill(study.folder / "results", left)
    output = study.expect_failure("--cores", "1", *EVERY_STAGE, config=STUDY)
    assert "disk is full" in output or "room" in output, output[-5000:]
    ballast.unlink()
    study.run("--cores", "2", *EVERY_STAGE, config=STUDY)
    assert differences(finished.numbers, numbers(study.folder)) == []
