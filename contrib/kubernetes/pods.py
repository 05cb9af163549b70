"""Run Snakemake's jobs as Kubernetes Jobs with kubectl: `pods.py submit [--gpu NAME] SCRIPT`, `pods.py status JOB`.

The template pod.yaml beside this file describes a pod; this script fills in the command and the resources of each job.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

RUN = "COPPICE_RUN"  # identifies the run, as in coppice.core.logs, so that a job that failed for good is not retried
TEMPLATE = Path(__file__).with_name("pod.yaml")


def manifest(script: str | Path, gpu: str) -> dict[str, Any]:
    """Return the manifest of a Job that runs a Snakemake job script. A comment in it states the job's resources."""
    script = Path(script).resolve()
    properties = json.loads(re.search(r"^# properties = (.*)$", script.read_text(), re.MULTILINE)[1])
    asked = properties["resources"]
    demands = {"cpu": str(asked.get("cpus_per_task", properties["threads"])), "memory": f"{asked['mem_mb']}M"}
    if asked.get("gpu"):
        demands[gpu] = str(asked["gpu"])
    job = yaml.safe_load(TEMPLATE.read_text())
    pod = job["spec"]["template"]["spec"]
    # The deadline is set on the pod, because that of a Job also counts the time in the queue
    pod["activeDeadlineSeconds"] = 60 * asked["runtime"]
    container = pod["containers"][0]
    container |= {"command": ["/bin/sh", str(script)], "workingDir": str(Path.cwd())}
    container["env"] = [*container.get("env", []), *environment()]
    # Kubernetes assigns GPUs by limits only, and it evicts pods whose limits equal their requests last
    container["resources"] = {"requests": demands, "limits": demands}
    return job


def environment() -> list[dict[str, str]]:
    """Return the environment variables of a pod: the run's identifier, and a cache folder on the shared volume."""
    variables = {"XDG_CACHE_HOME": str(Path.cwd() / ".snakemake" / "cache")}
    if RUN in os.environ:
        variables[RUN] = os.environ[RUN]
    return [{"name": name, "value": value} for name, value in variables.items()]


def submit(script: str, gpu: str) -> None:
    """Create the Job and print its name."""
    kubectl = ["kubectl", "create", "-o", "name", "-f", "-"]
    done = subprocess.run(
        kubectl, input=json.dumps(manifest(script, gpu)), text=True, stdout=subprocess.PIPE, check=True
    )
    print(done.stdout.strip())


def status(name: str) -> None:
    """Print success, failed or running. A Job that was deleted counts as failed."""
    kubectl = ["kubectl", "get", "--ignore-not-found", "-o", "json", name]
    done = subprocess.run(kubectl, text=True, capture_output=True, check=False)
    if done.returncode:  # the API did not answer, so the job may still be running
        print(done.stderr, file=sys.stderr)
        print("running")
        return
    conditions = (
        json.loads(done.stdout)["status"].get("conditions", []) if done.stdout.strip() else [{"type": "Failed"}]
    )
    ended = {condition["type"] for condition in conditions if condition.get("status", "True") == "True"}
    print("success" if "Complete" in ended else "failed" if "Failed" in ended else "running")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    submitting = commands.add_parser("submit")
    submitting.add_argument("--gpu", default="nvidia.com/gpu", help="resource name of a GPU in a pod")
    submitting.add_argument("script")
    commands.add_parser("status").add_argument("name")
    arguments = parser.parse_args()
    if arguments.command == "submit":
        submit(arguments.script, arguments.gpu)
    else:
        status(arguments.name)
