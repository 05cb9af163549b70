"""The last words of a run that failed: each failed job with its reason and its log, and the command that goes on.

Reasons come from the status files that jobs keep (see `logs.job`). A job that ended before it could keep one is
described by the last line of its log.
"""

import os
import shlex
from pathlib import Path

from coppice.core import logs
from coppice.core.errors import printable
from coppice.core.json_text import parsed
from coppice.core.secrets import redacted
from coppice.render.formatting import count

KILLED = "it was killed, perhaps because memory ran out"
UNKNOWN = "no reason was noted; see Snakemake's lines above"


def summary(failed, command):
    """Return the lines that end a run.

    Args:
        failed: the jobs that Snakemake's scheduler counts as failed for good, groups of jobs among them.
        command: the words after `snakemake` on the command line.
    """
    found = [(*_explained(job), list(job.log)) for one in failed for job in _jobs(one)]
    again = f"  snakemake {redacted(shlex.join(command))}".rstrip()
    if not found:
        return f"The run ended before all jobs did. The same command goes on from what is finished:\n{again}"
    lines = [f"{count(len(found), 'job')} failed:"]
    for title, reason, paths in sorted(found):
        lines += [f"  {title}: {reason}", *(f"    log: {path}" for path in paths)]
    return "\n".join([*lines, "Fix the cause and run the same command again; it keeps what is finished:", again])


def _jobs(job):
    """The single jobs in a job of the scheduler, which may be a group."""
    return job.jobs if job.is_group() else [job]


def _explained(job):
    """(what the job is about, why it failed)"""
    title = " ".join([job.rule.name, *map(str, job.wildcards_dict.values())])
    status = job.params.get("status") or (job.log and logs.status_beside(job.log[0]))
    try:
        facts = parsed(Path(status).read_text(encoding="utf-8"))
        of_this_run = facts["run"] == os.environ.get(logs.RUN)
    except (OSError, ValueError, KeyError, TypeError):  # it ended before it wrote one, or the rule keeps none
        of_this_run = False
    if not of_this_run:
        return title, _last_line(job.log) or UNKNOWN
    reason = KILLED if facts["state"] == "running" else facts.get("reason")
    return printable(facts.get("title") or title), printable(reason or _last_line(job.log) or UNKNOWN)


def _last_line(paths):
    for path in map(Path, paths):
        if path.is_file() and (lines := path.read_text(encoding="utf-8", errors="replace").split("\n")):
            return next((printable(line) for line in reversed(lines) if line.strip()), None)
    return None
