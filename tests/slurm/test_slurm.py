"""Run a small study through profiles/slurm on a real Slurm: devices, groups, retries, time limits, sbatch options.

Candidates are pruned and scored in groups. One training is cancelled; another is slow and has a time limit of two
minutes.
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
    "resources_per_job": "{finetune: {runtime: 2}}",
    "evaluate": checkouts.WITHOUT_COST,
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
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # e.g. a container without devices
            pytest.skip(f"Slurm does not start on this machine: {error}")
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = checkouts.new(tmp_path_factory.mktemp("login")).folder
    path = folder / "profiles/slurm/config.yaml"
    profile = yaml.safe_load(path.read_text())
    profile |= {"slurm-init-seconds-before-status-checks": 1, "latency-wait": 10}  # the jobs of this study take seconds
    profile |= {"groups": ["prune_candidate=candidates", "score_candidate=candidates"]}
    profile |= {"group-components": ["candidates=2"]}
    path.write_text(yaml.safe_dump(profile))
    return folder


FIELDS = "JobID:12,tres-per-job:20,Comment:120"


class Watch(threading.Thread):
    """Polls the queue while the study runs, and cancels the first fine-tuning of Qwen that it sees running."""

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
    """Return a function that runs snakemake on the login node; `stdout` also holds stderr."""
    patience = tmp_path_factory.mktemp("patience") / "log"

    def run(*arguments):
        environment = cluster.environment() | {"COPPICE_TEST_PATIENCE": str(patience), "HF_TOKEN": SECRET}
        environment["PATH"] = f"{Path(SNAKEMAKE).parent}:{environment['PATH']}"
        environment["PYTHONPATH"] = f"{HERE / 'patience'}:{os.environ.get('PYTHONPATH', '')}"
        options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 1500}
        done = subprocess.run([SNAKEMAKE, *arguments], cwd=checkout, env=environment, **options)
        assert done.returncode == 0, checkouts.failure_report(done.args, done.returncode, done.stdout, checkout)
        return done

    run.patience = patience
    return run


CONFIG = checkouts.config_arguments(STUDY)


@pytest.fixture(scope="module")
def study(cluster, snakemake):
    """Return (output of snakemake, Watch) of a run in which one job was cancelled."""
    watch = Watch(cluster)
    watch.start()
    try:
        done = snakemake("--profile", "profiles/slurm", *CONFIG)
    finally:
        watch.done.set()
        watch.join()
    return done.stdout, watch


def devices(checkout):
    """Return (start, end, device) of each job that computed on a GPU, from its status file."""
    spans = []
    for path in (checkout / "results/.status").rglob("*.json"):
        facts = json.loads(path.read_text())
        if facts.get("device"):
            spans.append((facts["started"], facts["updated"], facts["device"]))
    return spans


def test_the_study_writes_its_reports(study, checkout):
    for model in ("Mistral", "Qwen"):
        for config in ("best_acc", "best_ppl"):
            folder = checkout / f"results/finetuned_evaluation/{model}/{config}_finetuned"
            assert (folder / "comparison_report.txt").is_file()
    assert (checkout / "results/report/study_report.html").is_file()


def test_as_many_jobs_run_at_once_as_there_are_gpus(study):
    assert study[1].most == GPUS


def test_jobs_that_run_at_once_use_different_devices(study, checkout):
    spans = devices(checkout)
    assert {device for _, _, device in spans} == {str(number) for number in range(GPUS)}
    for first in spans:
        for second in spans:
            apart = first[1] <= second[0] or second[1] <= first[0]
            assert first is second or apart or first[2] != second[2]


def test_restarts_a_cancelled_job_and_finishes_the_study(study):
    output, watch = study
    assert watch.cancelled, "no fine-tuning was seen running"
    label = watch.seen[watch.cancelled]
    assert sum(comment == label for comment in watch.seen.values()) >= 2, watch.seen
    assert re.search(r"Trying to restart job|attempt", output)


def test_jobs_get_the_cpus_that_their_rule_requests(cluster, study):
    """The number of CPUs of the machine that submits the jobs does not matter."""
    lines = (cluster.folder / "jobs.txt").read_text()
    assert "JobState=COMPLETED" in lines
    requested = {int(cpus) for cpus in re.findall(r"ProcCnt=(\d+)", lines)}
    assert {1, 2} <= requested


def test_prunes_and_scores_candidates_in_groups(study):
    """Pruning and scoring the candidates of both models takes one submission instead of four."""
    labels = [label for label in study[1].seen.values() if "prune_candidate" in label or "score_candidate" in label]
    assert labels == ["rule_candidates_prune_candidate_score_candidate"]


def test_a_training_stops_before_its_time_limit_and_resumes_from_its_checkpoint(cluster, checkout, study, snakemake):
    """It ends with the result of an undisturbed training, which this test runs without Slurm."""
    folder = checkout / Path(snakemake.patience.read_text()).parent
    model, candidate = folder.parts[-3:-1]
    logs = [path.read_text() for path in (checkout / ".snakemake/slurm_logs/rule_finetune_lora").rglob("*.log")]
    assert any("SIGTERM received" in text and "stopped at step" in text for text in logs)
    assert "JobState=TIMEOUT" not in (cluster.folder / "jobs.txt").read_text()
    assert "continuing from checkpoint-" in (checkout / f"logs/finetune/{model}.{candidate}.log").read_text()
    stopped = outcome(folder)
    shutil.rmtree(folder)
    record = folder / "finetuning_config.json"
    snakemake("--executor", "local", "--cores", "2", str(record.relative_to(checkout)), *CONFIG)
    assert outcome(folder) == stopped


def outcome(folder):
    """Return the result of a training: the adapter's bytes and [(step, validation loss)]."""
    history = json.loads((folder / "training_state.json").read_text())["history"]
    losses = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return (folder / "adapter_model.safetensors").read_bytes(), losses


def test_the_profile_works_as_a_workflow_profile(cluster, snakemake, study):
    before = (cluster.folder / "jobs.txt").read_text().count("JobState=COMPLETED")
    target = "elsewhere/miniature/ptb/dataset.json"
    snakemake("--workflow-profile", "profiles/slurm", target, "--config", "resources=elsewhere")
    assert (cluster.folder / "jobs.txt").read_text().count("JobState=COMPLETED") == before + 1


def test_writes_no_secret_from_the_environment_to_a_file(cluster, checkout, study):
    written = [path for path in checkout.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("slurm_logs" in path.parts for path in written)
    assert not [path for path in [*written, cluster.folder / "jobs.txt"] if SECRET.encode() in path.read_bytes()]
