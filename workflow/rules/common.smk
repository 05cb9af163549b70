"""What the rules share: the study, wildcard constraints, and the words at a run's start and end.

Takes the configuration; gives the study, the patterns of its records, and the functions of wildcards that several rule
files have for their inputs and parameters.

The configuration is checked here, once, in the main process: a job that Snakemake starts on its own (a cluster's, or
one in a group) trusts it.
"""

import functools
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import IncompleteCheckpointException, WorkflowError

SCRIPTS = str(Path(workflow.current_basedir).parent / "scripts")
sys.path.insert(0, SCRIPTS)

from coppice import miniature
from coppice.core import disks, gpus, jobs
from coppice.core.errors import CoppiceError
from coppice.planning import gathered_inputs, grid_checks, job_resources
from coppice.planning.gathered_inputs import of_model, with_parameters
from coppice.report import study_report
from coppice.report.study_report import failures
from coppice.stages import select
from coppice.stages.select import scoring
from coppice.study import layout, settings, shared_resources

jobs.run_from(SCRIPTS)
if workflow.is_main_process:
    jobs.begin_run()
try:
    study = settings.load(config, workflow.configfiles)
    files = layout.Files(study)
    CHECKS = grid_checks.Checks(
        f"{study.results}/.grids.json",
        [study.candidates(model) for model in files.configurations],
    )
    # Snakemake knows its targets only after parsing; what on the command line is no target is ignored
    settings.check_targets(study, sys.argv[1:])
except CoppiceError as error:
    raise WorkflowError(str(error)) from None

# no parameters of rules: no result depends on them
gpus.configure(**study.config["gpus"], given=workflow.remote_exec)
if workflow.remote_exec:
    jobs.note_start()

gathered_inputs.plan_quickly()

RESULTS, RESOURCES = study.results, study.resources
LOGS = "logs"

# The record or folder of each stage
CANDIDATE = layout.record(RESULTS, "candidate")
SCORED = layout.folder(RESULTS, "scores")
SELECTION = layout.record(RESULTS, "selection")
FINETUNED = layout.folder(RESULTS, "training")
DENSE = layout.folder(RESULTS, "dense")
PRUNED = layout.folder(RESULTS, "pruned")
REPORTED = layout.folder(RESULTS, "finetuned")
# Of further seeds; {seeded} is empty for the first one, whose files lie at the usual paths
SEEDED = f"{FINETUNED}{{seeded}}"
REPORTED_SEED = f"{REPORTED}{{seeded}}"
REPORT = f"{RESULTS}/report"
RELEASED = f"{RESULTS}/candidates/{{model}}/released.json"
# What many jobs rest on, as one input in place of dozens: digests of the files that `gather_files` was given
GATHERED = f"{RESULTS}/.gathered"
ROWS = f"{GATHERED}/{{purpose}}.json"
POOL = f"{GATHERED}/candidates/{{model}}.json"
if workflow.is_main_process:
    gathered_inputs.forget_stale(GATHERED)


wildcard_constraints:
    model="|".join(map(re.escape, study.models)),
    config="|".join(map(re.escape, study.configs)),
    seeded=study.seed_folders(),
    candidate=r"[A-Za-z0-9][A-Za-z0-9._+-]*",
    dataset=r"[A-Za-z0-9][A-Za-z0-9._+-]*",


def pairs(pattern, **more):
    """`pattern` for every model and config of the run; of trainings, with the first seed where nothing else is said."""
    more = {"seeded": ""} | more
    return [
        path
        for model, config in study.pairs()
        for path in expand(pattern, model=model, config=config, **more)
    ]


@functools.cache
def noted_checks():
    """The checks that the points of the grids are in; noted where jobs will run, not by planning alone."""
    runs = workflow.executor_plugin is not None and not workflow.dryrun
    if workflow.is_main_process and runs:
        CHECKS.keep()
    return CHECKS


@with_parameters
def checked_grid(wildcards):
    """The record that the model takes a job's points of the grid, where that is checked."""
    if wildcards.model not in files.configurations:
        return []
    pattern = GRID.replace("{model}", wildcards.model)
    if SHARED:
        return pattern
    point = study.candidates(wildcards.model)[wildcards.candidate]
    return noted_checks().record(pattern, wildcards.candidate, point)


def loading(model):
    """How a model and all its pruned forms are loaded."""
    return {
        key: study.models[model][key]
        for key in ("dtype", "quantize", "trust_remote_code")
    }


# What decides no number goes to jobs by parameters that are functions of their output: Snakemake takes those to follow
# from it, and compares them with no earlier run


@with_parameters
def placement(wildcards, output):
    """Where the weights are put, as a rule parameter whose change reruns nothing."""
    return settings.rerun_policy.execution_settings(
        "models", study.models[wildcards.model]
    )


def execution(section):
    """How the work of a section is done, as a rule parameter whose change reruns nothing."""
    values = settings.rerun_policy.execution_settings(section, study.config[section])
    return with_parameters(lambda wildcards, output: values)


def prompt(model):
    """The form in which a model is asked."""
    return study.models[model]["prompt"]


def of_more_seeds(record):
    """`record` of the trainings with further seeds."""
    return [
        path
        for seed in study.more_seeds()
        for path in pairs(record, seeded=study.seed_folder(seed))
    ]


@functools.cache
def trained_before(model):
    """config -> candidate of the trainings of their own that were there when this run began."""
    paths = {
        config: (
            SELECTION.format(model=model, config=config),
            f"{FINETUNED}/finetuning_config.json".format(model=model, config=config),
        )
        for config in study.configs
    }
    return select.trained(paths)


def reusable(record):
    """The `record` of the config that chose the same candidate and is trained for all that did, where that is not this
    one: what was trained and evaluated for it is taken over. Known once all configs have chosen.
    """

    def inputs(wildcards):
        before = trained_before(wildcards.model)
        chosen = dict(before)  # outside this run, what is trained counts
        for config in {*study.active_configs(), wildcards.config}:
            try:
                made = checkpoints.select_best.get(model=wildcards.model, config=config)
            except IncompleteCheckpointException as waited:
                # Raised on, it has Snakemake make this job and the whole plan twice. Not needed: the job is made anew once
                # the choice is there. Of one that is there by now Snakemake has to find out whether it counts
                if Path(waited.targetfile).exists():
                    raise
                return [waited.targetfile]
            chosen[config] = select.chosen(made.output[0])
        alike = [c for c in study.configs if chosen.get(c) == chosen[wildcards.config]]
        trained = select.config_to_train(
            f"{RESULTS}/.owners/{wildcards.model}.json",
            chosen[wildcards.config],
            alike,
            before,
            decide=workflow.is_main_process,
        )
        if trained == wildcards.config:
            return []
        return [record.format(**dict(wildcards.items()) | {"config": trained})]

    return with_parameters(inputs)


def released():
    """The records of weights that were let go, where they are to go."""
    return expand(RELEASED, model=study.active_models()) if RELEASES else []


def status(stage, *key):
    """The status file of a job; wildcards in it are filled in as in any parameter."""
    name = ".".join(filter(None, key)).replace(os.sep, "")
    return f"{RESULTS}/.status/{stage}/{name}.json"


TASKS = study.evaluate["zero_shot"]["tasks"]
SHARED = study.config["candidates"]["per_job"] == "all"
CANDIDATE_JOB = "{model}" if SHARED else "{model}.{candidate}"
GRID_JOB = "{model}" if SHARED else "{model}.{check}"
# What a job's points are checked in: see `grid_checks`. Were it one record a model, and `ancient` to jobs whose points are as
# they were, Snakemake would skip all that rests on it in the run that checks it anew
GRID = f"{RESULTS}/candidates/{{model}}/" + (
    "grid.json" if SHARED else ".grids/{check}.json"
)
RELEASES = study.config["candidates"]["keep"] == "selected" and (
    study.config["candidates"]["table"] is None
    and study.active_configs() == list(study.configs)
)  # weights that a config may still choose are kept
EVALUATED = list(dict.fromkeys([*study.evaluate["perplexity"]["datasets"], *TASKS]))


def produced(pattern):
    """The outputs of one candidate job: of one candidate, or of a model's whole grid where its jobs are shared."""
    if not SHARED:
        return [pattern]
    return [
        pattern.replace("{candidate}", name)
        for name in study.candidates(study.active_models()[0])
    ]


@with_parameters
def job_candidates(wildcards):
    """name -> grid point or table row of the candidates that one job makes or scores."""
    every = study.candidates(wildcards.model)
    return every if SHARED else {wildcards.candidate: every[wildcards.candidate]}


@functools.cache
def records_of(model):
    """candidate -> (its pruning.json, its scores or None), as a rule parameter."""
    return scoring.records(study, model)


def candidate_records(model):
    """The last record of each of a model's candidates: its scores, which its pruning precedes, where it has any."""
    return [scores or pruning for pruning, scores in records_of(model).values()]


def evaluated(folder):
    """The records of an evaluation into `folder`; its samples are named in the first, with their digests."""
    return {
        "evaluation": f"{folder}/evaluation_results.json",
        "perplexity": f"{folder}/ppl_results.json",
    }


def introduction():
    """What this run works on, said before its first job."""
    models, configs = study.active_models(), study.active_configs()
    made = sum(len(study.candidates(model)) for model in models)
    lines = [
        f"Coppice: {len(models)} models x {len(configs)} configs = {len(study.pairs())} fine-tunings, "
        f"{made} candidates to choose from; results in {RESULTS}/",
        f"  models: {', '.join(models)}; configs: {', '.join(configs)}",
        "  jobs per stage: the table of job stats above",
    ]
    notices = list(study.notices)
    if unknown := sizes.unknown():
        notices.append(
            f"the size of {', '.join(unknown)} is not known before it is fetched; until then its jobs ask for memory and "
            "time as of 10^9 parameters (or set models.X.parameters)"
        )
    return "\n".join([*lines, *(f"  note: {notice}" for notice in notices)])


def check_shared_resources(dag):
    """End the run where another study made what this one asks for by the same name, and no job makes it anew."""
    needed = {str(file) for job in dag.jobs for file in job.output}
    made = {str(file) for job in dag.needrun_jobs() for file in job.output}
    for path, words in shared_resources.differing_records(study, files).items():
        if path in needed - made:
            raise WorkflowError(
                f"{path}: {words}: another study made it under the same name; set resources to a folder of this "
                "study's own, take another name, or delete that record to have it made anew"
            )


def cleared():
    """What is said of files that killed jobs left half-written: they go before the first job."""
    swept = disks.sweep([RESULTS, RESOURCES])
    return (
        [f"  note: {len(swept)} half-written files of killed jobs are removed"]
        if swept
        else []
    )


def terminal():
    """The terminal, beside Snakemake's own lines."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


def print_lines(*words):
    """Print lines to the terminal."""
    for word in words:
        terminal().print(word, soft_wrap=True)
