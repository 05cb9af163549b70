"""A killed Snakemake whose jobs go on, and two runs at once: both are reported and leave the results of one run."""

import shutil
from pathlib import Path

import pytest
from disturbance import EVERY_STAGE, STAGES

from coppice.core import mirror
from tests.study.checkout import STUDY
from tests.study.outcome import differences, numbers
from tests.study.running import Running

pytestmark = pytest.mark.slow


def test_the_next_run_says_how_to_remove_the_lock_of_a_killed_one(study_copy):
    (study_copy.folder / "results/report/study_report.html").unlink()
    with Running(study_copy) as running:
        running.wait_for(STAGES["report"])
        running.kill()
    output = study_copy.expect_failure("--cores", "1", config=STUDY)
    assert str(study_copy.folder) in output and "--unlock" in output
    study_copy.run("--unlock", config=STUDY)
    study_copy.run("--cores", "1", config=STUDY)
    assert (study_copy.folder / "results/report/study_report.html").exists()


def test_rejects_a_second_run_in_the_same_folder(study_copy):
    """The message names the folder, and the first run ends undisturbed."""
    (study_copy.folder / "results/report/study_report.html").unlink()
    with Running(study_copy) as first:
        job = first.wait_for(STAGES["report"])
        job.suspend()  # so that the first run does not end before the second begins
        output = study_copy.expect_failure("--cores", "1", config=STUDY)
        assert "cannot be locked" in output and str(study_copy.folder) in output
        job.resume()
        first.succeeds()
    assert "Nothing to be done" in study_copy.run("--cores", "1", config=STUDY).stdout


def test_a_rerun_waits_for_the_job_that_a_killed_snakemake_left(study_copy, finished):
    """Two trainings in one folder would overwrite each other's checkpoints."""
    path = study_copy.folder / "results/finetuned/Mistral/best_acc_finetuned/finetuning_config.json"
    trained = Path(mirror.origin_of(path)).parent.resolve()
    shutil.rmtree(trained)
    with Running(study_copy, str(path.relative_to(study_copy.folder))) as running:
        orphan = running.wait_for(STAGES["finetune"])
        # once the training has begun, it takes some seconds more
        running.wait_until(lambda: (trained / ".training_key.json").exists())
        orphan.suspend()
        running.process.kill()
        running.process.wait()
    study_copy.run("--unlock", config=STUDY)
    with Running(study_copy, str(path.relative_to(study_copy.folder))) as again:
        again.wait_until(lambda: "holds this job's lock" in again.text())
        orphan.resume()
        again.succeeds()
    assert (
        "restoring its result"
        in (study_copy.folder / "logs/finetune" / f"Mistral.{trained.parent.name}.log").read_text()
    )
    study_copy.run("--cores", "2", *EVERY_STAGE, config=STUDY)
    assert differences(finished.numbers, numbers(study_copy.folder)) == []
