"""Find out by planning what a change of the configuration would rerun, in a study that only looks finished.

No job runs. Every output of the study is made as an empty file (records that planning reads get content), and
Snakemake's own `--touch` notes the parameters and inputs of each. A changed configuration is then planned in this
process, which takes a fraction of the time of a dry run on the command line, and Snakemake itself says which of the
finished jobs it would run again.
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

TARGETS = frozenset({"all", "ablation"})
TRIGGERS = frozenset({RerunTrigger.MTIME, RerunTrigger.PARAMS, RerunTrigger.INPUT, RerunTrigger.SOFTWARE_ENV})


class Finished:
    """A study in `folder` (a checkout) whose jobs all look finished; `chosen` is {config: candidate}."""

    def __init__(self, folder, chosen):
        self.folder, self.chosen = Path(folder), chosen
        with chdir(self.folder):
            for _ in range(2):  # the jobs of the chosen candidates are known once the configs have chosen
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
        elif path.name == "pruning.json":
            records.write(path, {"weights_fingerprint": ""})
        else:
            path.touch()

    def reruns(self, changes):
        """Return {rule: set of bool} of the finished jobs that `changes` of the configuration make run again.

        The bool is True for a job that reruns because of the change itself, and False for one that reruns because an
        input of it is made again.
        """
        with chdir(self.folder), _planned(changes) as dag:
            again = {job for job in dag.jobs if dag.needrun(job) and _is_result(job)}
            reruns_of = {}
            for job in again:
                is_first = not any(above in again for above in dag.bfs(dag.dependencies, job) if above is not job)
                reruns_of.setdefault(job.rule.name, set()).add(is_first)
            return reruns_of

    def named(self, changes):
        """Return [(rule, its first wildcard: the model or the ablation)] of the finished jobs that rerun."""
        with chdir(self.folder), _planned(changes) as dag:
            again = [job for job in dag.jobs if dag.needrun(job) and _is_result(job)]
            return [(job.rule.name, next(iter(job.wildcards_dict.values()), "")) for job in again]

    def changed_parameters(self, changes):
        """Return the names of the rules with a finished job whose own parameters `changes` alter."""
        # named as targets, because Snakemake leaves their jobs out of the graph if the configs choose again
        made = (self.folder / "results/by_candidate").rglob("*.json")
        of_candidates = {str(path.relative_to(self.folder)) for path in made}
        with chdir(self.folder), _planned(changes, TARGETS | of_candidates) as dag:
            # asked here, because Snakemake does not compare the parameters of jobs that an updated input reruns anyway
            differs = dag.workflow.persistence.params_changed
            return {job.rule.name for job in dag.jobs if _is_result(job) and differs(job)}

    def added(self, changes):
        """Return {rule: number} of the jobs that `changes` of the configuration add; their outputs do not exist yet."""
        with chdir(self.folder), _planned(changes) as dag:
            new = [job for job in dag.jobs if dag.needrun(job) and not any(Path(file).exists() for file in job.output)]
            return Counter(job.rule.name for job in new if job.output)

    def each(self, many, processes=2):
        """Return `reruns` of each of `many` changes, in their order; one takes half a second of CPU time."""
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(self.reruns, many, chunksize=8))


def _is_result(job):
    """Return True if a job left a result; files that gather the inputs of many jobs exist for planning only."""
    return not job.rule.name.startswith("gather") and any(Path(file).exists() for file in job.output)


@contextmanager
def _api(changes, targets=TARGETS, **how):
    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=64),
            config_settings=ConfigSettings(config=changes),
            snakefile=Path("Snakefile"),
            workdir=Path("."),
        )
        yield workflow.dag(DAGSettings(targets=targets, rerun_triggers=TRIGGERS, **how))


@contextmanager
def _planned(changes, targets=TARGETS):
    """Yield the graph of jobs, planned but not run.

    These are the internal calls with which Snakemake's API prints such a graph.
    """
    with _api(changes, targets) as api:
        workflow = api.workflow_api._workflow
        workflow._prepare_dag(forceall=False, ignore_incomplete=True, lock_warn_only=True)
        workflow._build_dag()
        yield workflow.dag
