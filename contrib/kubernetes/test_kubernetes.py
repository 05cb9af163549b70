"""contrib/kubernetes with a fake kubectl whose pods are processes; nobody has tried it on a real Kubernetes."""

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
PROFILE = ("--profile", "contrib/kubernetes")
QUICK = ("--latency-wait", "1", "--seconds-between-status-checks", "1")
TARGET = "resources/miniature/ptb/dataset.json"


@pytest.fixture
def kubernetes(new_checkout, tmp_path, monkeypatch):
    """Return (a checkout on a machine with the fake kubectl, the folder that holds its Jobs)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").symlink_to(Path(__file__).parent / "fake_kubectl")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_KUBERNETES", str(tmp_path))
    return new_checkout("kubernetes"), tmp_path


def test_submits_a_job_as_a_kubernetes_job(kubernetes):
    checkout, folder = kubernetes
    checkout.run(*PROFILE, *QUICK, TARGET)
    assert (checkout.folder / TARGET).is_file()
    [job] = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert job["spec"]["template"]["spec"]["activeDeadlineSeconds"] == 30 * 60
    assert "activeDeadlineSeconds" not in job["spec"], "it would count the time in the queue"
    assert container(job)["workingDir"] == str(checkout.folder)
    assert container(job)["resources"]["limits"] == {"cpu": "1", "memory": "4000M"}


def test_submits_a_failed_job_again_and_reports_it(kubernetes):
    checkout, folder = kubernetes
    path = checkout.folder / "workflow/scripts/build_miniature_world.py"
    path.write_text('"""Fails."""\nraise SystemExit(3)\n')
    done = checkout.snakemake(*PROFILE, *QUICK, "--retries", "1", TARGET)
    assert done.returncode == 1 and "build_miniature_world" in done.stdout
    assert len(list(folder.glob("*.json"))) == 2


def test_a_training_requests_nvidia_gpus(kubernetes):
    """Tests the manifest only, because there is no GPU here."""
    checkout, folder = kubernetes
    script = folder / "snakejob.sh"
    properties = {"threads": 1, "resources": {"gpu": 2, "cpus_per_task": 8, "mem_mb": 9000, "runtime": 90}}
    script.write_text(f"#!/bin/sh\n# properties = {json.dumps(properties)}\ntrue\n")
    submit = yaml.safe_load((checkout.folder / "contrib/kubernetes/config.yaml").read_text())[
        "cluster-generic-submit-cmd"
    ]
    checkout.shell(f"COPPICE_RUN=this-run {submit} {script}")
    [job] = [json.loads(path.read_text()) for path in folder.glob("coppice-*.json")]
    assert job["spec"]["template"]["spec"]["activeDeadlineSeconds"] == 90 * 60
    environment = {variable["name"]: variable["value"] for variable in container(job)["env"]}
    assert environment == {"COPPICE_RUN": "this-run", "XDG_CACHE_HOME": str(checkout.folder / ".snakemake/cache")}
    assert container(job)["resources"]["limits"] == {"cpu": "8", "memory": "9000M", "nvidia.com/gpu": "2"}


def test_plans_the_whole_study(kubernetes):
    done = kubernetes[0].run(*PROFILE, "-n", "-q", "rules", config=SMALL)
    assert "link_training" in done.stdout


def container(job):
    return job["spec"]["template"]["spec"]["containers"][0]
