"""The closing lines of a failed run: each failed job with its reason and log, and the command that continues the run.

Reasons come from the status files that jobs write (see `logs.job`). For a job without one, the last line of its log
is the reason.
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
    found = [(*_explained(job), job.logs) for job in failed]
    again = f"  snakemake {redacted(shlex.join(command))}".rstrip()
    if not found:
        return f"The run stopped early. Run the same command again to continue; finished jobs are kept:\n{again}"
    lines = [f"{count(len(found), 'job')} failed:"]
    for title, reason, paths in sorted(found):
        lines += [f"  {title}: {reason}", *(f"    log: {path}" for path in paths)]
    return "\n".join([*lines, "Fix the cause and run the same command again; finished jobs are kept:", again])


def _explained(job: FailedJob) -> tuple[str, str]:
    """Return (title, reason) of a failed job."""
    status = job.status or (job.logs and logs.status_beside(job.logs[0]))
    try:
        facts = parsed(Path(status).read_text(encoding="utf-8"))
        # A status file of an earlier run says nothing about this failure.
        of_this_run = facts["run"] == os.environ.get(logs.RUN)
    except (OSError, ValueError, KeyError, TypeError):  # the job died before it wrote one, or its rule writes none
        of_this_run = False
    if not of_this_run:
        return job.title, _last_line(job.logs) or UNKNOWN
    # A job that fails writes its reason; one that still says "running" was killed before it could.
    reason = KILLED if facts["state"] == "running" else facts.get("reason")
    return printable(facts.get("title") or job.title), printable(reason or _last_line(job.logs) or UNKNOWN)


def _last_line(paths: Iterable[str]) -> str | None:
    """Return the last non-empty line of the first log that exists, or None."""
    for path in map(Path, paths):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((printable(line) for line in reversed(lines) if line.strip()), None)
    return None
