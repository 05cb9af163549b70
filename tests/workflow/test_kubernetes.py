"""profiles/kubernetes, with a kubectl of the tests' own whose pods are processes: never tried on a real Kubernetes."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import yaml

from tests.study.checkout import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("snakemake_executor_plugin_cluster_generic") is None,
        reason="snakemake-executor-plugin-cluster-generic is not installed (it is among envs/requirements-dev.txt)",
    ),
]
PROFILE = ("--profile", "profiles/kubernetes")
QUICK = ("--latency-wait", "1", "--seconds-between-status-checks", "1")
TARGET = "resources/miniature/ptb/dataset.json"


@pytest.fixture
def kubernetes(new_checkout, tmp_path, monkeypatch):
    """(a checkout on a machine with such a kubectl, the folder in which that keeps its Jobs)"""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").symlink_to(Path(__file__).parent / "kubectl")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_KUBERNETES", str(tmp_path))
    return new_checkout("kubernetes"), tmp_path


def test_a_job_becomes_a_job_of_kubernetes(kubernetes):
    checkout, folder = kubernetes
    checkout.run(*PROFILE, *QUICK, TARGET)
    assert (checkout.folder / TARGET).is_file()
    [job] = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert job["spec"]["template"]["spec"]["activeDeadlineSeconds"] == 30 * 60
    assert "activeDeadlineSeconds" not in job["spec"], "the time in the queue would count"
    assert container(job)["workingDir"] == str(checkout.folder)
    assert container(job)["resources"]["limits"] == {"cpu": "1", "memory": "4000M"}


def test_a_job_that_fails_is_submitted_again_and_told(kubernetes):
    checkout, folder = kubernetes
    path = checkout.folder / "workflow/scripts/build_miniature_world.py"
    path.write_text('"""Fails."""\nraise SystemExit(3)\n')
    done = checkout.snakemake(*PROFILE, *QUICK, "--retries", "1", TARGET)
    assert done.returncode == 1 and "build_miniature_world" in done.stdout
    assert len(list(folder.glob("*.json"))) == 2


def test_a_training_asks_for_its_gpu_by_name(kubernetes):
    """The manifest alone: there is no GPU here."""
    checkout, folder = kubernetes
    script = folder / "snakejob.sh"
    properties = {"threads": 1, "resources": {"gpu": 2, "cpus_per_task": 8, "mem_mb": 9000, "runtime": 90}}
    script.write_text(f"#!/bin/sh\n# properties = {json.dumps(properties)}\ntrue\n")
    submit = yaml.safe_load((checkout.folder / "profiles/kubernetes/config.yaml").read_text())[
        "cluster-generic-submit-cmd"
    ]
    checkout.shell(f"COPPICE_RUN=this-run {submit} {script}")
    [job] = [json.loads(path.read_text()) for path in folder.glob("coppice-*.json")]
    assert job["spec"]["template"]["spec"]["activeDeadlineSeconds"] == 90 * 60
    known = {variable["name"]: variable["value"] for variable in container(job)["env"]}
    assert known == {"COPPICE_RUN": "this-run", "XDG_CACHE_HOME": str(checkout.folder / ".snakemake/cache")}
    assert container(job)["resources"]["limits"] == {"cpu": "8", "memory": "9000M", "nvidia.com/gpu": "2"}


def test_the_whole_study_is_planned(kubernetes):
    done = kubernetes[0].run(*PROFILE, "-n", "-q", "rules", config=SMALL)
    assert "finetune_lora" in done.stdout


def container(job):
    return job["spec"]["template"]["spec"]["containers"][0]
