"""Read the jobs' status files, `{results}/.status/{stage}/*.json`: which job runs, waits, failed or was killed.

A job's title is its stage followed by names without spaces: "finetune Llama best_acc", "evaluate dense Llama",
"score Llama depth-0.25".
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coppice.core import disks
from coppice.core.aliases import PathLike
from coppice.core.errors import printable
from coppice.core.json_text import parsed

FOLDER = ".status"
CANDIDATE = ("prune", "import", "score")  # stages that work on a model's candidates, for all its configs
CHOSEN = ("finetune", "evaluate pruned", "evaluate finetuned")  # stages that work on the chosen candidates


@dataclass(frozen=True)
class Status:
    """One job: its stage, the names in its title, state, reason of a failure, and times in seconds since 1970."""

    stage: str
    names: tuple[str, ...]
    state: str
    reason: str | None
    started: float
    updated: float

    def concerns(self, model: str, config: str, candidate: str | None) -> bool:
        """Return whether the pair needs this job: its own, its candidate's, its dense model's or one for its choice."""
        name = candidate if self.stage in CHOSEN else config
        own = self.names == (model,) or self.names[:2] == (model, name)  # a seed may follow the name
        return own or (self.stage in CANDIDATE and self.names[:1] == (model,))

    def describe(self, now: float | None = None) -> str:
        """Return what runs and for how long, or why it failed."""
        if self.state == "failed":
            return f"{self.stage}: {self.reason or 'no reason recorded'}"
        minutes = ((now or time.time()) - self.started) / 60
        return f"{self.stage}, {minutes:.0f} min" if minutes >= 1 else self.stage


class Statuses:
    """All status files of a study."""

    def __init__(self, results: PathLike) -> None:
        """Read the status files under the folder `results`, without those that cannot be read."""
        folder = Path(results) / FOLDER
        self.jobs = [status for path in sorted(folder.rglob("*.json")) if (status := _read(path))]

    def of_pair(self, model: str, config: str, candidate: str | None = None, done: bool = False) -> tuple[str, str]:
        """Return (state, detail) of a pair, from all jobs that it needs (see `Status.concerns`).

        candidate: the one that the pair chose; None until then.

        States are done, running, waiting, failed and stopped (the job's process is gone, but it reported no end). A
        running job comes first, then a failed or stopped one. Once the pair is compared (`done`), only a running job
        counts: an earlier failure has been fixed by then.
        """
        own = [job for job in self.jobs if job.concerns(model, config, candidate)]
        for state in ("running", "failed", "stopped"):
            found = [job for job in own if job.state == state]
            if found and (state == "running" or not done):
                newest = max(found, key=lambda job: job.updated)
                return state, newest.describe()
        return ("done", "") if done else ("waiting", _waiting(own))


def _waiting(jobs: Sequence[Status]) -> str:
    """Return what a pair waits for if one of its jobs reports that, else the last stage that finished."""
    waiting = [job for job in jobs if job.state.startswith("waiting")]
    if waiting:
        return f"{waiting[-1].stage}: {waiting[-1].reason or waiting[-1].state}"
    finished = [job for job in jobs if job.state == "done"]
    return f"{max(finished, key=lambda job: job.updated).stage} finished" if finished else ""


def _read(path: Path) -> Status | None:
    """Return the `Status` in a file, or None if it cannot be read or is not a status file."""
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
    # A library's error message may hold line breaks and terminal control codes, so only printable text is shown.
    reason = facts.get("reason")
    return Status(stage, tuple(names), printable(state), reason and printable(reason), started, updated)
