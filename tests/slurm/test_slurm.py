"""A small study through profiles/slurm on a real Slurm: devices, retries, what sbatch was asked for."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from .cluster import GPUS, Cluster, missing

ROOT = Path(__file__).parents[2]
SHIPPED = ("Snakefile", "workflow", "config", "profiles", "envs")
STUDY = {
    "only": "{models: [Mistral, Qwen]}",
    "miniature": "{steps: 30}",
    "finetune": "{max_steps: 4, eval_steps: 2, save_steps: 2, warmup_steps: 1, data: {val_size: 20}}",
    "evaluate": "{zero_shot: {limit: 10, tasks: [piqa]}}",
    "candidates": "{prune: [{method: depth, ratio: 0.34}, {method: width, ratio: 0.5, importance: magnitude}]}",
    "threads_per_job": "{finetune: 2, evaluate: 1, prune: 1, build: 1}",
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
    folder = tmp_path_factory.mktemp("login")
    for part in SHIPPED:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    path = folder / "profiles/slurm/config.yaml"
    profile = yaml.safe_load(path.read_text())
    profile |= {"slurm-init-seconds-before-status-checks": 1, "latency-wait": 10}  # jobs here last seconds
    path.write_text(yaml.safe_dump(profile))
    return folder


FIELDS = "JobID:12,tres-per-job:20,Comment:120"


class Watch(threading.Thread):
    """Looks at the queue while the study runs; cancels the first fine-tuning that it sees running."""

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
                if self.cancelled is None and "finetune_lora" in comment:
                    self.cancelled = number
                    self.cluster.ask("scancel", number)


@pytest.fixture(scope="module")
def study(cluster, checkout):
    """(what Snakemake said, what was seen in the queue) of a run with one job cancelled in the middle."""
    watch = Watch(cluster)
    watch.start()
    words = [f"{key}={value}" for key, value in STUDY.items()]
    command = [str(Path(sys.executable).parent / "snakemake"), "--profile", "profiles/slurm", "--config", *words]
    environment = cluster.environment() | {"HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        command,
        cwd=checkout,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1500,
    )
    watch.done.set()
    watch.join()
    assert done.returncode == 0, done.stdout[-8000:]
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
