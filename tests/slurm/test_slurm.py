"""A small study through profiles/slurm on a real Slurm: devices, groups, retries, time limits, what sbatch was asked.

Candidates are pruned and scored in groups; one training is cancelled; another is slow, and its time limit is a minute.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from tests.study import checkout as checkouts
from tests.study.checkout import SECRETS, SNAKEMAKE

from .cluster import GPUS, Cluster, missing

pytestmark = pytest.mark.guard
HERE = Path(__file__).parent
SECRET = SECRETS["HF_TOKEN"]
STUDY = checkouts.STUDY | {
    "threads_per_job": "{finetune: 2, evaluate: 1, prune: 1, build: 1}",
    "resources_per_job": "{finetune: {runtime: 1}}",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        try:
            running.start()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # a container that may make no device
            pytest.skip(f"Slurm does not start on this machine: {error}")
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = checkouts.new(tmp_path_factory.mktemp("login")).folder
    path = folder / "profiles/slurm/config.yaml"
    profile = yaml.safe_load(path.read_text())
    profile |= {"slurm-init-seconds-before-status-checks": 1, "latency-wait": 10}  # jobs here last seconds
    profile |= {"groups": ["prune_candidate=candidates", "score_candidate=candidates"]}
    profile |= {"group-components": ["candidates=2"]}
    path.write_text(yaml.safe_dump(profile))
    return folder


FIELDS = "JobID:12,tres-per-job:20,Comment:120"


class Watch(threading.Thread):
    """Looks at the queue while the study runs; cancels the first fine-tuning of Qwen that it sees running."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.cluster, self.done = cluster, threading.Event()
        self.seen, self.most, self.cancelled = {}, 0, None

    def run(self):
        while not self.done.wait(0.3):
            try:
                jobs = self.cluster.ask("squeue", "-h", "-t", "R", f"--Format={FIELDS}").splitlines()
            except subprocess.CalledProcessError:
                continue
            with_gpu = [job for job in jobs if "gpu" in job[12:32]]
            self.most = max(self.most, len(with_gpu))
            for job in with_gpu:
                number, comment = job[:12].strip(), job[32:].strip()
                self.seen.setdefault(number, comment)
                if self.cancelled is None and "finetune_lora" in comment and "Qwen" in comment:
                    self.cancelled = number
                    self.cluster.ask("scancel", number)


@pytest.fixture(scope="module")
def snakemake(cluster, checkout, tmp_path_factory):
    """A function that runs snakemake on the login node; what it says is in `stdout`."""
    patience = tmp_path_factory.mktemp("patience") / "log"

    def run(*arguments):
        environment = cluster.environment() | {"COPPICE_TEST_PATIENCE": str(patience), "HF_TOKEN": SECRET}
        environment["PATH"] = f"{Path(SNAKEMAKE).parent}:{environment['PATH']}"
        environment["PYTHONPATH"] = f"{HERE / 'patience'}:{os.environ.get('PYTHONPATH', '')}"
        options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 1500}
        done = subprocess.run([SNAKEMAKE, *arguments], cwd=checkout, env=environment, **options)
        assert done.returncode == 0, checkouts.explained(done.args, done.returncode, done.stdout, checkout)
        return done

    run.patience = patience
    return run


CONFIG = checkouts.words(STUDY)


@pytest.fixture(scope="module")
def study(cluster, snakemake):
    """(what Snakemake said, what was seen in the queue) of a run with one job cancelled in the middle."""
    watch = Watch(cluster)
    watch.start()
    try:
        done = snakemake("--profile", "profiles/slurm", *CONFIG)
    finally:
        watch.done.set()
        watch.join()
    return done.stdout, watch


def devices(checkout):
    """(start, end, device) of each job that computed with a GPU, from its log and status."""
    spans = []
    for path in (checkout / "results/.status").rglob("*.json"):
        facts = json.loads(path.read_text())
        if facts.get("device"):
            spans.append((facts["started"], facts["updated"], facts["device"]))
    return spans


def test_the_study_ends_with_its_reports(study, checkout):
    for model in ("Mistral", "Qwen"):
        for config in ("best_acc", "best_ppl"):
            folder = checkout / f"results/finetuned_evaluation/{model}/{config}_finetuned"
            assert (folder / "comparison_report.txt").is_file()
    assert (checkout / "results/report/study_report.html").is_file()


def test_no_more_jobs_at_once_than_there_are_gpus(study):
    assert study[1].most == GPUS


def test_two_jobs_at_a_time_never_have_the_same_device(study, checkout):
    spans = devices(checkout)
    assert {device for _, _, device in spans} == {str(number) for number in range(GPUS)}
    for first in spans:
        for second in spans:
            apart = first[1] <= second[0] or second[1] <= first[0]
            assert first is second or apart or first[2] != second[2]


def test_a_job_that_is_cancelled_comes_back_and_the_study_ends(study):
    said, watch = study
    assert watch.cancelled, "no fine-tuning was seen running"
    label = watch.seen[watch.cancelled]
    assert sum(comment == label for comment in watch.seen.values()) >= 2, watch.seen
    assert re.search(r"Trying to restart job|attempt", said)


def test_jobs_get_the_cpus_that_their_rule_asks_for(cluster, study):
    """Whatever the machine that submits them has."""
    lines = (cluster.folder / "jobs.txt").read_text()
    assert "JobState=COMPLETED" in lines
    asked = {int(cpus) for cpus in re.findall(r"ProcCnt=(\d+)", lines)}
    assert {1, 2} <= asked


def test_candidates_are_made_in_groups(study):
    """Pruning and scoring both models' candidates is one submission, where it would have been four."""
    labels = [label for label in study[1].seen.values() if "prune_candidate" in label or "score_candidate" in label]
    assert labels == ["rule_candidates_prune_candidate_score_candidate"]


def test_a_training_that_does_not_end_in_time_stops_with_a_checkpoint_and_goes_on_from_it(
    cluster, checkout, study, snakemake
):
    """It ends where an undisturbed one does, which is run here and now, without Slurm."""
    folder = checkout / Path(snakemake.patience.read_text()).parent
    model, config = folder.parent.name, folder.name.removesuffix("_finetuned")
    said = [path.read_text() for path in (checkout / ".snakemake/slurm_logs/rule_finetune_lora").rglob("*.log")]
    assert any("told to stop (SIGTERM)" in text and "stopped at step" in text for text in said)
    assert "JobState=TIMEOUT" not in (cluster.folder / "jobs.txt").read_text()
    assert "continuing from checkpoint-" in (checkout / f"logs/finetune/{model}.{config}.log").read_text()
    stopped = outcome(folder)
    shutil.rmtree(folder)
    record = folder / "finetuning_config.json"
    snakemake("--executor", "local", "--cores", "2", str(record.relative_to(checkout)), *CONFIG)
    assert outcome(folder) == stopped


def outcome(folder):
    """What a training ends with: the adapter's bytes, and the validation losses on its way."""
    history = json.loads((folder / "training_state.json").read_text())["history"]
    losses = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return (folder / "adapter_model.safetensors").read_bytes(), losses


def test_the_profile_serves_as_the_workflows_own_profile_too(cluster, snakemake, study):
    before = (cluster.folder / "jobs.txt").read_text().count("JobState=COMPLETED")
    target = "elsewhere/miniature/ptb/dataset.json"
    snakemake("--workflow-profile", "profiles/slurm", target, "--config", "resources=elsewhere")
    assert (cluster.folder / "jobs.txt").read_text().count("JobState=COMPLETED") == before + 1


def test_no_secret_of_the_environment_is_written_down(cluster, checkout, study):
    written = [path for path in checkout.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("slurm_logs" in path.parts for path in written)
    assert not [path for path in [*written, cluster.folder / "jobs.txt"] if SECRET.encode() in path.read_bytes()]
