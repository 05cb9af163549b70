"""A small study that is disturbed: jobs killed at chosen moments, and the results of two runs held against each other.

Moments are shares of the CPU time that a job takes undisturbed: on a busy machine too they fall where they are meant.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from tests.workflow.conftest import SMALL, Checkout

ABLATION = {
    "start": {"model": "Mistral", "config": "best_acc"},
    "data": {"val_size": 20},
    "base": {"learning_rate": 0.004, "batch_size": 8, "warmup_steps": 1},
    "metrics": {"tasks": ["piqa"], "perplexity": [], "limit": 10},
    "budget": {"max_steps": 4},
    "eval_steps": 2,
    "arms": [{"r": 2}, {"r": 8}],
}
EVALUATE = {"zero_shot": {"limit": 20, "tasks": ["piqa", "arc_easy"]}, "cost": {"enabled": False}}
STUDY = SMALL | {
    "evaluate": json.dumps(EVALUATE),
    "ablations": json.dumps({"arms": ABLATION, "presets": None, "order": None}),
}
NOBODY = 65534  # the user who owns nothing
TARGETS = ("all", "ablation")
# With those stages whose records nobody misses while the reports that were made of them are there
EVERY_STAGE = ("candidates", "select", "finetune", "evaluate", "compare", *TARGETS)

# stage -> the scripts that do its work
STAGES = {
    "data": ("build_miniature_world", "build_miniature_model"),
    "prune": ("prune_candidate",),
    "score": ("score_candidate",),
    "select": ("select_best", "summarize_selection", "release_weights"),
    "finetune": ("finetune_lora",),
    "evaluate": ("evaluate_model",),
    "compare": ("compare_stages",),
    "report": ("write_report",),
    "ablation": ("train_arm", "write_ablation_report"),
}
STAGE_OF = {script: stage for stage, scripts in STAGES.items() for script in scripts}
SCRIPT = re.compile(r"/tmp\w+\.(\w+)\.py$")

# What two runs of the same study differ in: when, how long, how much memory, and what is made of these
TIMED = {
    "checksum",
    "started",
    "seconds",
    "tokens_per_second",
    "eval_runtime",
    "eval_samples_per_second",
    "peak_memory_bytes",
    "evaluation_seconds",
    "training_seconds",
    "freed_bytes",
}


def chances(name):
    """A source of random moments, the same for the same COPPICE_FAULTS_SEED (see conftest)."""
    return random.Random(f"{os.environ['COPPICE_FAULTS_SEED']} {name}")


class Running:
    """A snakemake that is running in `checkout`, one job at a time unless `cores` says otherwise."""

    def __init__(self, checkout, *arguments, config=STUDY, cores=1, environment=None):
        words = [f"{key}={value}" for key, value in config.items()]
        command = [str(Path(sys.executable).parent / "snakemake"), "--cores", str(cores), *arguments]
        variables = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {"HF_HUB_OFFLINE": "1"}
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
        self.folder = checkout.folder
        self.output = checkout.folder / "run.log"
        with open(self.output, "w") as log:
            self.process = psutil.Popen(
                [*command, "--config", *words],
                cwd=checkout.folder,
                env=variables | (environment or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()

    def jobs(self):
        """pid -> (script, process) of the jobs that compute now; their wrappers are none of them."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for process in self.process.children(recursive=True):
                with suppress(psutil.NoSuchProcess, IndexError):
                    words = process.cmdline()
                    if len(words) == 2 and (match := SCRIPT.search(words[1])):
                        found[process.pid] = (match[1], process)
        return found

    def wait_for(self, scripts, timeout=600):
        """The process of the next job with one of the `scripts`; None where the run ended without."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            for script, process in self.jobs().values():
                if script in scripts:
                    return process
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.02)
        return None

    def kill(self):
        """Everything at once, as when the power fails."""
        with suppress(psutil.NoSuchProcess):
            everything = [self.process, *self.process.children(recursive=True)]
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()  # so that none sees another one end
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def wait(self, timeout=900):
        """The exit code, once it has ended by itself."""
        return self.process.wait(timeout)

    def text(self):
        """What it has printed."""
        return self.output.read_text(errors="replace")


def spent(process):
    """Seconds of CPU that a process has taken; None once it is gone."""
    try:
        times = process.cpu_times()
        return times.user + times.system if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def wait_until(process, seconds):
    """Whether `process` is still there once it has taken so many `seconds` of CPU."""
    while (taken := spent(process)) is not None:
        if taken >= seconds:
            return True
        time.sleep(0.005)
    return False


def wait_until_it_writes(process, folder, deadline=60):
    """Whether a file that is not whole yet is there while `process` runs."""
    until = time.monotonic() + deadline
    while time.monotonic() < until and spent(process) is not None:
        for place, folders, files in os.walk(folder):
            if any(name.startswith(".partial") for name in [*folders, *files]):
                return Path(place).is_dir()
    return False


def lives(running):
    """script -> most CPU seconds that one of its jobs took, by watching a run to its end."""
    longest, seen = {}, {}
    while running.process.poll() is None:
        seen |= running.jobs()
        for pid, (script, process) in list(seen.items()):
            taken = spent(process)
            if taken is None:
                del seen[pid]
            else:
                longest[script] = max(longest.get(script, 0), taken)
        time.sleep(0.05)
    return longest


def finished(folder):
    """path -> when it was written, of the records in `results` and `resources` of a study."""
    return {path: path.stat().st_mtime_ns for path in _records(folder)}


def _records(folder):
    for root in ("results", "resources"):
        for path in (folder / root).rglob("*.json"):
            inside = path.relative_to(folder).parts
            hidden = any(part.startswith((".", "checkpoint-", "superseded-")) for part in inside)
            if not hidden and "schema_version" in path.read_text(encoding="utf-8"):
                yield path


def numbers(folder):
    """All that a study in `folder` found out, without times: path -> content.

    Records, tables of samples, the adapters' tensors, and the tables that people read.
    """
    import pandas

    found = {str(path.relative_to(folder)): _without_times(json.loads(path.read_text())) for path in _records(folder)}
    results = folder / "results"
    for path in results.rglob("*.parquet"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            found[str(path.relative_to(folder))] = pandas.read_parquet(path).to_json()
    for path in results.glob("*/**/adapter_model.safetensors"):
        if "checkpoint-" not in str(path):
            tensors = load_file(path)
            found[str(path.relative_to(folder))] = {name: tensors[name].tobytes() for name in sorted(tensors)}
    found["results/candidates.tsv"] = (results / "candidates.tsv").read_text()
    return found


def _without_times(content):
    if isinstance(content, dict):
        return {
            key: "a time" if key == "cost" and value else _without_times(value)
            for key, value in content.items()
            if key not in TIMED
        }
    return [_without_times(value) for value in content] if isinstance(content, list) else content


def differences(expected, found):
    """Where two results of `numbers` differ, in a few words each."""
    lost = [f"{path}: is not there" for path in expected.keys() - found.keys()]
    more = [f"{path}: should not be there" for path in found.keys() - expected.keys()]
    other = [
        f"{path}: {_first_difference(expected[path], found[path])}"
        for path in expected.keys() & found.keys()
        if expected[path] != found[path]
    ]
    return sorted([*lost, *more, *other])


def _first_difference(one, other, place=""):
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{place}.{key}")
    return f"{place or 'content'} is {str(other)[:200]}, not {str(one)[:200]}"


def left_behind(folder):
    """Files and folders that only a killed job leaves."""
    return [path for root in ("results", "resources") for path in (folder / root).rglob(".partial*")]


def copied(study, folder):
    """A copy of a study's folder, with its links and time stamps, so that nothing is to be done in it."""
    shutil.copytree(study.folder, folder, symlinks=True)
    return Checkout(folder)


def kill_one(process):
    """End one process without a word."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


@contextmanager
def not_as_root():
    """Without root's right to read everything, for the time being; what is imported then has to be imported before."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def open_to_all():
    """A folder that everybody may write to, and so may its parents' be entered; it goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)
