"""Jobs and Snakemake itself, killed at any moment of any stage: a rerun ends with the numbers of an undisturbed run.

The devices that jobs lease here do not exist; each kill takes a holder away. COPPICE_FAULTS_KILLS sets how often a
stage is disturbed, COPPICE_FAULTS_SEED the moments.
"""

import os
import shutil

import pytest
from disturbance import STAGES, chances

from tests.study.checkout import SMALL
from tests.study.outcome import differences, left_behind, numbers, written
from tests.study.running import Running, wait_until, wait_until_it_writes

KILLS = int(os.environ.get("COPPICE_FAULTS_KILLS", "1"))
CANDIDATES = ("depth-0.34", "width-0.5-magnitude")

# stage -> the targets of a run that ends with it, and where the records lie that its jobs may write again
TARGETS = {
    "data": (["resources/miniature/models/mistral/model.json"], "resources/miniature"),
    "prune": (["candidates"], "results/candidates"),
    "score": (
        [f"results/candidate_evaluation/Mistral/{name}/evaluation_results.json" for name in CANDIDATES],
        "results/candidate_evaluation",
    ),
    "select": (["select"], "results"),
    "finetune": (["finetune"], "results/finetuned"),
    "evaluate": (["evaluate"], "results"),
    "compare": (["compare"], "results/finetuned_evaluation"),
    "report": (["report"], "results/report"),
    "ablation": (["ablation"], "results/ablation"),
}
# what is taken back of a stage that is through: what its target asks for, or Snakemake would not miss it
FINISHED = {
    "data": "resources/miniature/models/*/model.json",
    "prune": "results/candidates/*/*/pruning.json",
    "score": "results/candidate_evaluation/*/*/evaluation_results.json",
    "select": "results/for_finetuning/*/*/selection_info.json",
    "finetune": "results/finetuned/*/*/finetuning_config.json",
    "evaluate": "results/*ed_evaluation/*/*_finetuned/evaluation_results.json",
    "compare": "results/finetuned_evaluation/*/*/comparison_report.txt",
    "report": "results/report/study_report.html",
    "ablation": "results/ablation/*/*/*/arm.json",
}


class Disturber:
    """Kills what runs in a study, stage by stage, and looks after each kill at what the next run does."""

    def __init__(self, checkout, lives, chance, leases):
        self.checkout, self.lives, self.chance = checkout, lives, chance
        self.environment = {"CUDA_VISIBLE_DEVICES": "GPU-of-these-tests", "COPPICE_GPU_LEASES": str(leases)}
        self.killed, self.orphan = [], None

    def disturb(self, stage):
        """Kill one job of `stage`, or everything around it."""
        targets, _ = TARGETS[stage]
        while True:
            with self.run(*targets) as running:
                done = self._kill_in(running, stage)
            if done:
                self.killed.append((stage, *done))
                print("killed:", stage, *done)
                return
            self._take_back(stage)

    def run(self, *targets):
        """A run of the study; what an earlier kill has left goes out of its way as a user would have it go."""
        if (self.checkout.folder / ".snakemake/locks").exists():
            shutil.rmtree(self.checkout.folder / ".snakemake/locks")  # --unlock does no more: see below
        return Running(self.checkout, *targets, config=SMALL, environment=self.environment)

    def _kill_in(self, running, stage):
        """(script, what was killed, when), or None where the run ended first."""
        while process := running.wait_for(STAGES[stage]):
            script = next(script for script, each in running.jobs().values() if each.pid == process.pid)
            moment = "while it writes" if self.chance.random() < 0.25 else round(self.chance.random(), 3)
            if moment == "while it writes":
                there = wait_until_it_writes(process, self.checkout.folder)
            else:
                there = wait_until(process, moment * self.lives[script])
            if not there:
                continue
            victim = self.chance.choice(["the job", "everything", "snakemake"])
            self._kill(running, process, victim)
            return script, victim, moment
        running.ends_well()
        return None

    def _kill(self, running, process, victim):
        if victim == "everything":
            running.kill()
            return
        if victim == "snakemake":  # its jobs go on, and nobody waits for them any more
            running.process.kill()
            running.process.wait()
            return
        process.kill()
        assert running.wait() == 1, "a run whose job was killed says so by its exit code"

    def _take_back(self, stage):
        """A record of a stage that is through, at random, so that there is something to kill again."""
        path = self.chance.choice(sorted(self.checkout.folder.glob(FINISHED[stage])))
        path.unlink()
        for page in self.checkout.folder.glob("results/ablation/*/ablation_report.html"):
            page.unlink()
        if self.chance.random() < 0.5:
            shutil.rmtree(path.parent / ".parts", ignore_errors=True)


def of_one_model(found):
    """Of `numbers`, those that a study of one model finds too."""
    return {
        path: content for path, content in found.items() if "qwen" not in path.lower() and not path.endswith(".tsv")
    }


@pytest.mark.guard
def test_killed_in_every_stage_a_study_ends_as_if_nothing_had_been(finished, new_checkout, tmp_path):
    disturber = Disturber(new_checkout("killed"), finished.lives, chances("kills"), tmp_path / "leases")
    folder = disturber.checkout.folder
    for stage in STAGES:
        for _ in range(KILLS):
            before = written(folder)
            count = len(disturber.killed)
            disturber.disturb(stage)
            check_nothing_is_done_twice(folder, before, [kill[0] for kill in disturber.killed[max(0, count - 1) :]])
    with disturber.run("all", "ablation") as running:
        running.ends_well()
    assert differences(of_one_model(finished.numbers), of_one_model(numbers(folder))) == [], disturber.killed
    assert not left_behind(folder)


def check_nothing_is_done_twice(folder, before, stages):
    """What was finished `before` is written again only by the jobs that were killed, those of these `stages`."""
    after = written(folder)
    again = {path.relative_to(folder) for path, when in before.items() if after.get(path) != when}
    elsewhere = [path for path in again if not any(str(path).startswith(TARGETS[stage][1]) for stage in stages)]
    assert not elsewhere, f"computed again: {elsewhere}"
    assert "data" in stages or len({path.parent for path in again}) <= len(stages), f"computed again: {again}"
