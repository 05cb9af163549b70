"""Jobs of Snakemake as Jobs of Kubernetes, by kubectl: `pods.py submit [--gpu NAME] SCRIPT`, `pods.py status JOB`.

What a pod looks like stands in pod.yaml beside this file; here each job's demands are filled in.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

RUN = "COPPICE_RUN"  # as in coppice.logs: by it a job knows that it has failed for good in this run
TEMPLATE = Path(__file__).with_name("pod.yaml")


def manifest(script, gpu):
    """The Job that runs the job script of Snakemake, whose second line says what the job asks for."""
    script = Path(script).resolve()
    properties = json.loads(re.search(r"^# properties = (.*)$", script.read_text(), re.MULTILINE)[1])
    asked = properties["resources"]
    demands = {"cpu": str(asked.get("cpus_per_task", properties["threads"])), "memory": f"{asked['mem_mb']}M"}
    if asked.get("gpu"):
        demands[gpu] = str(asked["gpu"])
    job = yaml.safe_load(TEMPLATE.read_text())
    pod = job["spec"]["template"]["spec"]
    pod["activeDeadlineSeconds"] = 60 * asked["runtime"]  # of the pod: that of a Job counts the time in the queue too
    container = pod["containers"][0]
    container |= {"command": ["/bin/sh", str(script)], "workingDir": str(Path.cwd())}
    container["env"] = [*container.get("env", []), *environment()]
    # a GPU is only ever given by a limit; a pod whose limits are its requests is the last to be evicted
    container["resources"] = {"requests": demands, "limits": demands}
    return job


def environment():
    """What pods know beside their image: the call of snakemake, and a folder of the volume for the digests of files."""
    known = {"XDG_CACHE_HOME": str(Path.cwd() / ".snakemake" / "cache")}
    if RUN in os.environ:
        known[RUN] = os.environ[RUN]
    return [{"name": name, "value": value} for name, value in known.items()]


def submit(script, gpu):
    """Create the Job and print its name."""
    kubectl = ["kubectl", "create", "-o", "name", "-f", "-"]
    done = subprocess.run(
        kubectl, input=json.dumps(manifest(script, gpu)), text=True, stdout=subprocess.PIPE, check=True
    )
    print(done.stdout.strip())


def status(name):
    """Print success, failed or running; a Job that somebody has deleted has failed."""
    kubectl = ["kubectl", "get", "--ignore-not-found", "-o", "json", name]
    done = subprocess.run(kubectl, text=True, capture_output=True, check=False)
    if done.returncode:  # the API does not answer: nothing is known of the job
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
    submitting.add_argument("--gpu", default="nvidia.com/gpu", help="the name of a GPU among a pod's resources")
    submitting.add_argument("script")
    commands.add_parser("status").add_argument("name")
    arguments = parser.parse_args()
    if arguments.command == "submit":
        submit(arguments.script, arguments.gpu)
    else:
        status(arguments.name)
