"""Kill jobs and Snakemake at random moments of every stage: a rerun ends with the results of an undisturbed run.

The devices that jobs lease here do not exist; each kill removes the holder of a lease. COPPICE_FAULTS_KILLS sets the
number of kills a stage, COPPICE_FAULTS_SEED their moments.
"""

import os
import shutil

import pytest
from disturbance import STAGES, seeded_random

from coppice.core import mirror
from tests.study.checkout import SMALL
from tests.study.outcome import differences, left_behind, modification_times, numbers
from tests.study.running import Running, wait_for_cpu_seconds, wait_for_partial_file

KILLS = int(os.environ.get("COPPICE_FAULTS_KILLS", "1"))
CANDIDATES = ("depth-0.34", "width-0.5-magnitude")

# stage -> the targets of a run that ends with it, and the folder of the records that its jobs may write again
TARGETS = {
    "data": (["resources/miniature/models/mistral/model.json"], "resources/miniature"),
    "prune": (["candidates"], "results/candidates"),
    "score": (
        [f"results/candidate_evaluation/Mistral/{name}/evaluation_results.json" for name in CANDIDATES],
        "results/candidate_evaluation",
    ),
    "select": (["select"], "results"),
    "finetune": (["finetune"], "results/by_candidate"),
    "evaluate": (["evaluate"], "results"),
    "compare": (["compare"], "results/finetuned_evaluation"),
    "report": (["report"], "results/report"),
    "ablation": (["ablation"], "results/ablation"),
}
# stage -> the records to delete if it has finished; Snakemake would not notice that other files are missing
REMOVABLE = {
    "data": "resources/miniature/models/*/model.json",
    "prune": "results/candidates/*/*/pruning.json",
    "score": "results/candidate_evaluation/*/*/evaluation_results.json",
    "select": "results/for_finetuning/*/*/selection_info.json",
    "finetune": "results/by_candidate/*/*/finetuned/finetuning_config.json",
    "evaluate": "results/by_candidate/*/*/finetuned_evaluation/evaluation_results.json",
    "compare": "results/finetuned_evaluation/*/*/comparison_report.txt",
    "report": "results/report/study_report.html",
    "ablation": "results/ablation/*/*/*/arm.json",
}


class Killer:
    """Kills what runs in a study, stage by stage."""

    def __init__(self, checkout, cpu_seconds, rng, leases):
        self.checkout, self.cpu_seconds, self.rng = checkout, cpu_seconds, rng
        self.environment = {"CUDA_VISIBLE_DEVICES": "GPU-of-these-tests", "COPPICE_GPU_LEASES": str(leases)}
        self.killed, self.orphan = [], None

    def kill_once(self, stage):
        """Kill one job of `stage`, or everything around it."""
        targets, _ = TARGETS[stage]
        while True:
            with self.run(*targets) as running:
                done = self._kill_in(running, stage)
            if done:
                self.killed.append((stage, *done))
                print("killed:", stage, *done)
                return
            self._delete_record(stage)

    def run(self, *targets):
        """Return a run of the study, after removing the lock that an earlier kill left, as a user would."""
        if (self.checkout.folder / ".snakemake/locks").exists():
            shutil.rmtree(self.checkout.folder / ".snakemake/locks")  # `snakemake --unlock` does the same
        return Running(self.checkout, *targets, config=SMALL, environment=self.environment)

    def _kill_in(self, running, stage):
        """Return (script, what was killed, when), or None if the run ended first."""
        while process := running.wait_for(STAGES[stage]):
            script = next(script for script, each in running.jobs().values() if each.pid == process.pid)
            moment = "while it writes" if self.rng.random() < 0.25 else round(self.rng.random(), 3)
            if moment == "while it writes":
                there = wait_for_partial_file(process, self.checkout.folder)
            else:
                there = wait_for_cpu_seconds(process, moment * self.cpu_seconds[script])
            if not there:
                continue
            victim = self.rng.choice(["the job", "everything", "snakemake"])
            self._kill(running, process, victim)
            return script, victim, moment
        running.succeeds()
        return None

    def _kill(self, running, process, victim):
        if victim == "everything":
            running.kill()
            return
        if victim == "snakemake":  # its jobs go on without it
            running.process.kill()
            running.process.wait()
            return
        process.kill()
        assert running.wait() == 1, "a run whose job was killed must fail"

    def _delete_record(self, stage):
        """Delete a random record of a finished stage, so that there is something to kill again."""
        path = self.rng.choice(sorted(self.checkout.folder.glob(REMOVABLE[stage])))
        path.unlink()
        for page in self.checkout.folder.glob("results/ablation/*/ablation_report.html"):
            page.unlink()
        if self.rng.random() < 0.5:
            shutil.rmtree(path.parent / ".parts", ignore_errors=True)


def of_one_model(found):
    """Return the part of `numbers` that a study of one model has too."""
    return {
        path: content for path, content in found.items() if "qwen" not in path.lower() and not path.endswith(".tsv")
    }


@pytest.mark.guard
def test_a_study_killed_in_every_stage_ends_with_the_same_results(finished, new_checkout, tmp_path):
    killer = Killer(new_checkout("killed"), finished.cpu_seconds, seeded_random("kills"), tmp_path / "leases")
    folder = killer.checkout.folder
    for stage in STAGES:
        for _ in range(KILLS):
            before = modification_times(folder)
            count = len(killer.killed)
            killer.kill_once(stage)
            check_only_killed_jobs_ran_again(folder, before, [kill[0] for kill in killer.killed[max(0, count - 1) :]])
    with killer.run("all", "ablation") as running:
        running.succeeds()
    assert differences(of_one_model(finished.numbers), of_one_model(numbers(folder))) == [], killer.killed
    assert not left_behind(folder)


def check_only_killed_jobs_ran_again(folder, before, stages):
    """Check that what had finished `before` was written again only by the killed jobs, those of `stages`."""
    after = modification_times(folder)
    made = {path for path, when in before.items() if after.get(path) != when}
    # the records that configs have of their candidate's results are copied again
    again = {path.relative_to(folder) for path in made if not (path.parent / mirror.ORIGIN).is_symlink()}
    elsewhere = [path for path in again if not any(str(path).startswith(TARGETS[stage][1]) for stage in stages)]
    assert not elsewhere, f"computed again: {elsewhere}"
    assert "data" in stages or len({path.parent for path in again}) <= len(stages), f"computed again: {again}"
