"""The jobs' status files, `{results}/.status/{stage}/{key}.json`: which job runs, waits, failed or was killed.

`key` is the job's wildcards joined by "/": `finetune/Llama/best_acc.json`, `evaluate_dense/Llama.json`.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = ".status"


def path_of(results, stage, *wildcards):
    """Where the job of `stage` with these wildcards keeps its status file."""
    return Path(results, FOLDER, stage, *wildcards[:-1], f"{wildcards[-1] if wildcards else stage}.json")


@dataclass(frozen=True)
class Status:
    """One job: its stage, the key in its path, title, state, reason of a failure, and times in seconds since 1970."""

    stage: str
    key: str
    title: str
    state: str
    reason: str | None
    started: float
    updated: float

    def describe(self, now=None):
        """A few words: what runs and for how long, or why it failed."""
        if self.state == "failed":
            return f"{self.stage}: {self.reason or 'no reason was given'}"
        minutes = ((now or time.time()) - self.started) / 60
        return f"{self.stage}, {minutes:.0f} min" if minutes >= 1 else self.stage


class Statuses:
    """All status files of a study."""

    def __init__(self, results):
        folder = Path(results) / FOLDER
        self.jobs = [status for path in sorted(folder.rglob("*.json")) if (status := _read(folder, path))]

    def of_pair(self, model, config, done=False):
        """(state, detail) of a pair: the newest job about it decides, unless its comparison is there and newer jobs rest.

        States: done, running, waiting, failed, stopped (its process is gone without an end).
        """
        keys = _keys(model, config)
        own = [job for job in self.jobs if job.key in keys or job.key == model or _of_candidate(job, model)]
        for state in ("running", "failed", "stopped"):
            found = [job for job in own if job.state == state]
            if found and (state == "running" or not done):
                newest = max(found, key=lambda job: job.updated)
                return state, newest.describe()
        return ("done", "") if done else ("waiting", _waiting(own))


def _of_candidate(job, model):
    """Whether the job prunes or scores one of the model's candidates, for which all its pairs wait."""
    return job.key.startswith(f"{model}/") and ("candidate" in job.stage or job.stage in ("prune", "score"))


def _waiting(jobs):
    """For what a pair waits, where a job of it said so; else the last thing it finished."""
    waiting = [job for job in jobs if job.state.startswith("waiting")]
    if waiting:
        return f"{waiting[-1].stage}: {waiting[-1].reason or waiting[-1].state}"
    finished = [job for job in jobs if job.state == "done"]
    return f"after {max(finished, key=lambda job: job.updated).stage}" if finished else ""


def _keys(model, config):
    tuned = f"{config}_finetuned"
    return {f"{model}{between}{name}" for between in ("/", "-", "_", ".") for name in (config, tuned)}


def _read(folder, path):
    """The Status in a file; None for one that is no status file (it is being replaced, or not ours)."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        state = facts["state"]
        started, updated = float(facts["started"]), float(facts["updated"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if state == "running" and _gone(facts):
        state = "stopped"
    stage, _, key = str(path.relative_to(folder).with_suffix("")).partition("/")
    title = str(facts.get("title") or "")
    return Status(stage, key, title, str(state), facts.get("reason"), started, updated)


def _gone(facts):
    """Whether the process that wrote the file has ended without saying so; only its own machine can tell."""
    pid = facts.get("pid")
    if facts.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
