"""Everything that reaches beyond Snakemake's documented interface, and the versions in which it was seen to work.

Rule files call these functions instead of reading Snakemake's objects, whose properties are undocumented as well. Each
function has a test in `tests/unit/test_snakemake_compat.py`, which fails if Snakemake changes what the function uses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from coppice.core.errors import SettingsError

if TYPE_CHECKING:
    from snakemake.io import Wildcards
    from snakemake.workflow import Workflow

Value = TypeVar("Value")

# The newest version that the tests ran with. The oldest is in `min_version` of workflow/Snakefile.
NEWEST_TESTED = (9, 27)


def untested_version() -> str | None:
    """Return a notice if Snakemake is newer than every version that the tests ran with, else None."""
    from snakemake.common import __version__

    found = tuple(map(int, __version__.split(".")[:2]))
    if found <= NEWEST_TESTED:
        return None
    newest = ".".join(map(str, NEWEST_TESTED))
    return (
        f"Snakemake {__version__} is newer than {newest}, the newest version that Coppice is tested with. If the run "
        f'fails inside Snakemake, install the tested one: pip install "snakemake=={newest}.*"'
    )


def parse_uris_once() -> None:
    """Cache `smart_open.parse_uri`, which Snakemake calls four times per job for the script's path.

    Each call builds a class. The cache saves a quarter of the CPU time of planning four thousand jobs.
    """
    import smart_open  # a dependency of Snakemake

    if not hasattr(smart_open.parse_uri, "cache_info"):
        smart_open.parse_uri = functools.cache(smart_open.parse_uri)


def inspected_once(function: Callable[..., Value]) -> Callable[..., Value]:
    """Store a function's signature on it and return it, because Snakemake inspects each three times per job.

    `inspect.signature` returns `__signature__` if there is one. This saves a fifth of the CPU time of planning.
    """
    function.__signature__ = inspect.signature(function)
    return function


def untracked(value: Callable[[Wildcards], Value]) -> Callable[..., Value]:
    """Return a rule parameter with the value `value(wildcards)`, of which no change reruns anything.

    Snakemake records the parameters of a job and reruns it if one changed. It leaves out functions of `output`, because
    they usually derive from tracked facts. There is no documented way to leave a parameter out: resources and
    environment variables take no dictionaries, and an input file would be tracked itself.
    """
    return inspected_once(lambda wildcards, output: value(wildcards))


def is_main_process(workflow: Workflow) -> bool:
    """Return whether this process plans and schedules. Snakemake parses the rules again in each cluster job."""
    return workflow.is_main_process


def is_cluster_job(workflow: Workflow) -> bool:
    """Return whether this process runs a job that a cluster's scheduler started."""
    return workflow.remote_exec


def uses_a_cluster(workflow: Workflow) -> bool:
    """Return whether other machines run the jobs.

    In a dry run this is a guess: Snakemake then says of the intended executor only whether it uses threads.
    """
    intended = workflow.dryrun and workflow.execution_settings.use_threads
    return bool(intended or not workflow.local_exec)


def configuration_files(workflow: Workflow) -> list[str]:
    """Return the paths of the configuration files, in the order in which they are merged."""
    return workflow.configfiles


def used_outputs(workflow: Workflow) -> set[str]:
    """Return the outputs that the planned jobs use but that no job of this run makes."""
    jobs = workflow.dag.jobs
    made = {str(file) for job in workflow.dag.needrun_jobs() for file in job.output}
    return {str(file) for job in jobs for file in job.output} - made


@dataclass(frozen=True)
class FailedJob:
    """A failed job: its rule and wildcards in one line, its log files, and its parameter `status`, if it has one."""

    title: str
    logs: list[str] = field(default_factory=list)
    status: str | None = None


def failed_jobs(workflow: Workflow) -> list[FailedJob]:
    """Return the jobs that the scheduler counts as failed, those of a failed group one by one."""
    failed = [each for job in workflow.scheduler.failed for each in (job.jobs if job.is_group() else [job])]
    return [
        FailedJob(
            " ".join([job.rule.name, *map(str, job.wildcards_dict.values())]), list(job.log), job.params.get("status")
        )
        for job in failed
    ]


def parsed_config_arguments(words: Iterable[str]) -> dict[str, Any]:
    """Return the values of `--config KEY=VALUE ...`, parsed as Snakemake's command line does.

    Raises:
        SettingsError: a word is not of this form.
    """
    from snakemake.cli import parse_config

    try:
        return parse_config(words)
    except ValueError as error:
        raise SettingsError(f"--config {' '.join(words)}: {error}") from error
