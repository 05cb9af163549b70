"""Snakemake killed while its jobs go on, and two runs at once: each is told, and the numbers stay those of one run."""

import shutil
import time

from disturbance import EVERY_STAGE, STAGES, STUDY, Running, differences, numbers


def test_a_killed_snakemake_leaves_a_lock_and_the_next_one_says_how_to_remove_it(copied):
    (copied.folder / "results/report/study_report.html").unlink()
    with Running(copied) as running:
        running.wait_for(STAGES["report"])
        running.kill()
    refused = copied.snakemake("--cores", "1", config=STUDY)
    assert refused.returncode == 1
    assert str(copied.folder) in refused.stdout and "--unlock" in refused.stdout
    copied.run("--unlock", config=STUDY)
    copied.run("--cores", "1", config=STUDY)
    assert (copied.folder / "results/report/study_report.html").exists()


def test_two_runs_in_one_folder_at_once_are_one_too_many(copied):
    """The second is told whose folder it is, and the first ends undisturbed."""
    (copied.folder / "results/report/study_report.html").unlink()
    with Running(copied) as first:
        job = first.wait_for(STAGES["report"])
        job.suspend()  # so that it is not through before the second begins
        second = copied.snakemake("--cores", "1", config=STUDY)
        assert second.returncode == 1 and "cannot be locked" in second.stdout and str(copied.folder) in second.stdout
        job.resume()
        assert first.wait() == 0, first.text()[-3000:]
    assert "Nothing to be done" in copied.run("--cores", "1", config=STUDY).stdout


def test_a_run_after_a_killed_snakemake_waits_for_the_job_that_goes_on(copied, undisturbed):
    """Two trainings in one folder would take each other's checkpoints."""
    path = copied.folder / "results/finetuned/Mistral/best_acc_finetuned/finetuning_config.json"
    shutil.rmtree(path.parent)
    with Running(copied, str(path.relative_to(copied.folder))) as running:
        orphan = running.wait_for(STAGES["finetune"])
        until = time.monotonic() + 120
        while not (path.parent / ".training_key.json").exists():  # it is at work, and has seconds to go
            assert time.monotonic() < until and orphan.is_running(), running.text()[-3000:]
            time.sleep(0.02)
        orphan.suspend()
        running.process.kill()
        running.process.wait()
    copied.run("--unlock", config=STUDY)
    with Running(copied, str(path.relative_to(copied.folder))) as again:
        job = again.wait_for(STAGES["finetune"])
        until = time.monotonic() + 120
        while "still at work" not in again.text():
            assert time.monotonic() < until and job.is_running(), again.text()[-3000:]
            time.sleep(0.2)
        orphan.resume()
        assert again.wait() == 0, again.text()[-3000:]
    assert "restored" in (copied.folder / "logs/finetune/Mistral.best_acc.log").read_text()
    copied.run("--cores", "2", *EVERY_STAGE, config=STUDY)
    assert differences(undisturbed.numbers, numbers(copied.folder)) == []
