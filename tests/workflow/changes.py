"""What a change of the configuration would rerun, found by planning: a study stands there as if it were finished.

No job is run. Every file that the study would leave is put there empty (records that planning reads, with content), and
Snakemake's own `--touch` notes down with which parameters and inputs each was made. Then a changed configuration is
planned, in this process, at a fraction of the time that a dry run on the command line takes, and Snakemake says itself
which of the finished jobs it would run again.
"""

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, contextmanager
from pathlib import Path

from snakemake.api import SnakemakeApi
from snakemake.settings.types import (
    ConfigSettings,
    DAGSettings,
    OutputSettings,
    Quietness,
    RerunTrigger,
    ResourceSettings,
)

from coppice.core import records

TARGETS = {"all", "ablation"}
TRIGGERS = frozenset({RerunTrigger.MTIME, RerunTrigger.PARAMS, RerunTrigger.INPUT, RerunTrigger.SOFTWARE_ENV})


class Finished:
    """A study in `folder` (a checkout) whose jobs have all been done, or so it looks; `chosen`: config -> candidate."""

    def __init__(self, folder, chosen):
        self.folder, self.chosen = Path(folder), chosen
        with chdir(self.folder):
            with _planned({}) as dag:
                for job in dag.jobs:
                    for file in job.output:
                        self._put(Path(file), job)
            with _api({}, forceall=True) as api:
                api.execute_workflow(executor="touch")
        assert not self.reruns({}), "the study does not look finished"

    def _put(self, path, job):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "selection_info.json":
            identity = {"model": job.wildcards.model, "config": job.wildcards.config}
            chosen = self.chosen[job.wildcards.config]
            records.write(path, identity | {"candidate": chosen, "weights_fingerprint": ""})
        else:
            path.touch()

    def reruns(self, changes):
        """Finished jobs that `changes` of the configuration make run again: {rule: set of the first of their line}.

        First of its line is a job that runs again on its own account, not because an input of it is made again.
        """
        with chdir(self.folder), _planned(changes) as dag:
            again = {job for job in dag.jobs if dag.needrun(job) and _is_result(job)}
            found = {}
            for job in again:
                first = not any(above in again for above in dag.bfs(dag.dependencies, job) if above is not job)
                found.setdefault(job.rule.name, set()).add(first)
            return found

    def added(self, changes):
        """Jobs that `changes` of the configuration add to the study, none of whose files is there: {rule: number}."""
        with chdir(self.folder), _planned(changes) as dag:
            new = [job for job in dag.jobs if dag.needrun(job) and not any(Path(file).exists() for file in job.output)]
            return Counter(job.rule.name for job in new if job.output)

    def each(self, many, processes=2):
        """`reruns` of each of `many` changes, in their order; half a second of a processor's time each."""
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(self.reruns, many, chunksize=8))


def _is_result(job):
    """Whether a job left a result: lists of what many jobs rest on, made for the sake of planning, are none."""
    return not job.rule.name.startswith("gather") and any(Path(file).exists() for file in job.output)


@contextmanager
def _api(changes, **how):
    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=64),
            config_settings=ConfigSettings(config=changes),
            snakefile=Path("Snakefile"),
            workdir=Path("."),
        )
        yield workflow.dag(DAGSettings(targets=TARGETS, rerun_triggers=TRIGGERS, **how))


@contextmanager
def _planned(changes):
    """The graph of jobs, planned and not run; of Snakemake's API the part that prints such a graph."""
    with _api(changes) as api:
        workflow = api.workflow_api._workflow
        workflow._prepare_dag(forceall=False, ignore_incomplete=True, lock_warn_only=True)
        workflow._build_dag()
        yield workflow.dag
