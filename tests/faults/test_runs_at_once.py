"""Snakemake killed while its jobs go on, and two runs at once: each is told, and the numbers stay those of one run."""

import shutil

import pytest
from disturbance import EVERY_STAGE, STAGES

from tests.study.checkout import STUDY
from tests.study.outcome import differences, numbers
from tests.study.running import Running

pytestmark = pytest.mark.slow


def test_a_killed_snakemake_leaves_a_lock_and_the_next_one_says_how_to_remove_it(copied):
    (copied.folder / "results/report/study_report.html").unlink()
    with Running(copied) as running:
        running.wait_for(STAGES["report"])
        running.kill()
    said = copied.refused("--cores", "1", config=STUDY)
    assert str(copied.folder) in said and "--unlock" in said
    copied.run("--unlock", config=STUDY)
    copied.run("--cores", "1", config=STUDY)
    assert (copied.folder / "results/report/study_report.html").exists()


def test_two_runs_in_one_folder_at_once_are_one_too_many(copied):
    """The second is told whose folder it is, and the first ends undisturbed."""
    (copied.folder / "results/report/study_report.html").unlink()
    with Running(copied) as first:
        job = first.wait_for(STAGES["report"])
        job.suspend()  # so that it is not through before the second begins
        said = copied.refused("--cores", "1", config=STUDY)
        assert "cannot be locked" in said and str(copied.folder) in said
        job.resume()
        first.ends_well()
    assert "Nothing to be done" in copied.run("--cores", "1", config=STUDY).stdout


def test_a_run_after_a_killed_snakemake_waits_for_the_job_that_goes_on(copied, finished):
    """Two trainings in one folder would take each other's checkpoints."""
    path = copied.folder / "results/finetuned/Mistral/best_acc_finetuned/finetuning_config.json"
    shutil.rmtree(path.parent)
    with Running(copied, str(path.relative_to(copied.folder))) as running:
        orphan = running.wait_for(STAGES["finetune"])
        # once it is at work, it has seconds to go
        running.wait_until(lambda: (path.parent / ".training_key.json").exists())
        orphan.suspend()
        running.process.kill()
        running.process.wait()
    copied.run("--unlock", config=STUDY)
    with Running(copied, str(path.relative_to(copied.folder))) as again:
        again.wait_until(lambda: "still at work" in again.text())
        orphan.resume()
        again.ends_well()
    assert "restored" in (copied.folder / "logs/finetune/Mistral.best_acc.log").read_text()
    copied.run("--cores", "2", *EVERY_STAGE, config=STUDY)
    assert differences(finished.numbers, numbers(copied.folder)) == []
