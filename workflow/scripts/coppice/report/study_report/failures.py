"""The closing lines of an incomplete run: each failed job with its reason and log, and the command that continues it.

Reasons come from the status files that jobs write (see `logs.job`). For a job without one, the last line of its log
is the reason. To Snakemake a job that a user or a scheduler stopped failed; here it is listed as stopped.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from coppice.core import logs
from coppice.core.errors import printable
from coppice.core.json_text import parsed
from coppice.core.secrets import redacted
from coppice.render.formatting import count

KILLED = "the job was killed, perhaps because it ran out of memory"
UNKNOWN = "no reason recorded; see Snakemake's messages above"


class FailedJob(Protocol):
    """A failed job, as `snakemake_compat.failed_jobs` returns it."""

    @property
    def title(self) -> str:
        """Its rule and wildcards in one line."""

    @property
    def logs(self) -> Sequence[str]:
        """The paths of its log files."""

    @property
    def status(self) -> str | None:
        """The path of its status file, or None."""


def summary(failed: Iterable[FailedJob], command: Sequence[str]) -> str:
    """Return the lines that end a run.

    Args:
        failed: the failed jobs.
        command: the words after `snakemake` on the command line.
    """
    jobs = {"failed": [], "stopped before the end": []}
    for job in failed:
        title, reason, is_stopped = _explained(job)
        lines = [f"  {title}: {reason}", *(f"    log: {path}" for path in job.logs)]
        jobs["stopped before the end" if is_stopped else "failed"].append(lines)
    summed = []
    for outcome, found in jobs.items():
        summed += [f"{count(len(found), 'job')} {outcome}:"] if found else []
        summed += [line for lines in sorted(found) for line in lines]
    remedy = "Fix the cause and run" if jobs["failed"] else "Run" if summed else "The run stopped early. Run"
    again = f"  snakemake {redacted(shlex.join(command))}".rstrip()
    return "\n".join([*summed, f"{remedy} the same command again to continue; finished jobs are kept:", again])


def _explained(job: FailedJob) -> tuple[str, str, bool]:
    """Return (title, reason, whether it was stopped on purpose) of a job that did not finish."""
    status = job.status or (job.logs and logs.status_beside(job.logs[0]))
    try:
        facts = parsed(Path(status).read_text(encoding="utf-8"))
        # A status file of an earlier run says nothing about this failure.
        of_this_run = facts["run"] == os.environ.get(logs.RUN)
    except (OSError, ValueError, KeyError, TypeError):  # the job died before it wrote one, or its rule writes none
        of_this_run = False
    if not of_this_run:
        return job.title, _last_line(job.logs) or UNKNOWN, False
    # A job that fails writes its reason; one that still says "running" was killed before it could.
    reason = KILLED if facts["state"] == "running" else facts.get("reason")
    title, reason = facts.get("title") or job.title, reason or _last_line(job.logs) or UNKNOWN
    return printable(title), printable(reason), facts["state"] == "stopped"


def _last_line(paths: Iterable[str]) -> str | None:
    """Return the last non-empty line of the first log that exists, or None."""
    for path in map(Path, paths):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((printable(line) for line in reversed(lines) if line.strip()), None)
    return None
