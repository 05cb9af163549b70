"""The jobs' status files, `{results}/.status/{stage}/*.json`: which job runs, waits, failed or was killed.

A job's title says what it is about: its stage, then the names: "finetune Llama best_acc", "evaluate dense Llama",
"score Llama depth-0.25". Names hold no spaces.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from coppice.core import disks
from coppice.core.errors import printable
from coppice.core.json_text import parsed

FOLDER = ".status"
CANDIDATE = ("prune", "import", "score")


@dataclass(frozen=True)
class Status:
    """One job: its stage, the names it is about, state, reason of a failure, and times in seconds since 1970."""

    stage: str
    names: tuple
    state: str
    reason: str | None
    started: float
    updated: float

    def concerns(self, model, config):
        """Whether the pair needs this job: one of its own, of its dense model, or of the model's candidates."""
        own = self.names == (model,) or self.names[:2] == (model, config)  # with a seed after them, or not
        return own or (self.stage in CANDIDATE and self.names[:1] == (model,))

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
        self.jobs = [status for path in sorted(folder.rglob("*.json")) if (status := _read(path))]

    def of_pair(self, model, config, done=False):
        """(state, detail) of a pair, from all jobs that it waits for: its own, its model's, its candidates'.

        A running job decides, then a failed or stopped one; once the pair is compared (`done`), only a running one.
        States: done, running, waiting, failed, stopped (its process is gone without an end).
        """
        own = [job for job in self.jobs if job.concerns(model, config)]
        for state in ("running", "failed", "stopped"):
            found = [job for job in own if job.state == state]
            if found and (state == "running" or not done):
                newest = max(found, key=lambda job: job.updated)
                return state, newest.describe()
        return ("done", "") if done else ("waiting", _waiting(own))


def _waiting(jobs):
    """For what a pair waits, where a job of it said so; else the last thing it finished."""
    waiting = [job for job in jobs if job.state.startswith("waiting")]
    if waiting:
        return f"{waiting[-1].stage}: {waiting[-1].reason or waiting[-1].state}"
    finished = [job for job in jobs if job.state == "done"]
    return f"after {max(finished, key=lambda job: job.updated).stage}" if finished else ""


def _read(path):
    """The Status in a file; None for one that is no status file (it is being replaced, or not ours)."""
    try:
        facts = parsed(path.read_text(encoding="utf-8"))
        state = facts["state"]
        started, updated = float(facts["started"]), float(facts["updated"])
        stage, *names = printable(facts.get("title") or path.parent.name).split()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if state == "running" and disks.gone(facts.get("host"), facts.get("pid")):
        state = "stopped"
    if stage == "evaluate" and names:
        stage, names = f"evaluate {names[0]}", names[1:]
    reason = facts.get("reason")  # a library's own words may break lines and move cursors
    return Status(stage, tuple(names), printable(state), reason and printable(reason), started, updated)
