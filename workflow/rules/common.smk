"""The study, wildcard constraints, and the messages at the start and end of a run, shared by all rule files.

Input: the configuration.
Output: the study, the path patterns of its records, and functions of wildcards that several rule files use for inputs
and parameters.

Every Snakemake process that parses these files loads and checks the configuration: the main process, and the process
that runs a job on a cluster. Scripts never read it; they get values through `params`.
"""

import functools
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

SCRIPTS = str(Path(workflow.current_basedir).parent / "scripts")
sys.path.insert(0, SCRIPTS)

from coppice import miniature
from coppice.core import disks, gpus, jobs
from coppice.core.errors import CoppiceError
from coppice.planning import (
    calibrated,
    gathered_inputs,
    job_resources,
    snakemake_compat,
)
from coppice.planning.gathered_inputs import of_model
from coppice.planning.snakemake_compat import inspected_once, untracked
from coppice.report import study_report
from coppice.report.study_report import failures
from coppice.stages import select
from coppice.stages.select import scoring
from coppice.study import chat_date, layout, settings, shared_resources
from coppice.study.settings import registry
from coppice.study.settings.own_sections import names_in as measured_on

jobs.run_from(SCRIPTS)
MAIN_PROCESS = snakemake_compat.is_main_process(workflow)
if MAIN_PROCESS:
    jobs.begin_run()
try:
    study = settings.load(config, snakemake_compat.configuration_files(workflow))
    files = layout.Files(study)
    # Snakemake knows its targets only after parsing, so all words of the command line are checked; those that are not
    # paths in the results folder pass
    settings.check_targets(study, sys.argv[1:])
except CoppiceError as error:
    raise WorkflowError(str(error)) from None

# GPU settings are set here instead of in rules' params because no result depends on them
CLUSTER_JOB = snakemake_compat.is_cluster_job(workflow)
gpus.configure(**study.config.gpus.model_dump(), given=CLUSTER_JOB)
if CLUSTER_JOB:
    jobs.note_start()

gathered_inputs.plan_quickly()

RESULTS, RESOURCES = study.results, study.resources
CHAT_DATE = chat_date.of(study.config.chat_date, RESULTS)
LOGS = "logs"

# The record or the folder of each stage
CANDIDATE = layout.record(RESULTS, "candidate")
SCORED = layout.folder(RESULTS, "scores")
SELECTION = layout.record(RESULTS, "selection")
FINETUNED = layout.folder(RESULTS, "training")
DENSE = layout.folder(RESULTS, "dense")
PRUNED = layout.folder(RESULTS, "pruned")
REPORTED = layout.folder(RESULTS, "finetuned")
LATENCY = layout.record(RESULTS, "latency")
# The same for each seed: {seeded} is `/seed-<n>` for an additional seed and empty for the first one
SEEDED = f"{FINETUNED}{{seeded}}"
REPORTED_SEED = f"{REPORTED}{{seeded}}"
# Trainings and evaluations belong to a candidate. The folders of the configs that chose it show them
TRAINING = f"{layout.by_candidate(RESULTS, 'training')}{{seeded}}"
EVALUATED_PRUNED = layout.by_candidate(RESULTS, "pruned")
EVALUATED_FINETUNED = f"{layout.by_candidate(RESULTS, 'finetuned')}{{seeded}}"
REPORT = f"{RESULTS}/report"
RELEASED = f"{RESULTS}/candidates/{{model}}/released.json"
# Inputs that many jobs share, as one file with their digests instead of dozens of inputs (see `gathered_inputs`)
GATHERED = f"{RESULTS}/.gathered"
GATHERED_ROWS = f"{GATHERED}/{{purpose}}.json"
GATHERED_ROWS_OF_MODEL = f"{GATHERED}/rows/{{model}}/{{purpose}}.json"
GATHERED_CANDIDATES = f"{GATHERED}/candidates/{{model}}.json"
if MAIN_PROCESS:
    gathered_inputs.forget_stale(GATHERED)


wildcard_constraints:
    model="|".join(map(re.escape, study.models)),
    config="|".join(map(re.escape, study.configs)),
    seeded=study.seed_folders(),
    candidate=r"[A-Za-z0-9][A-Za-z0-9._+-]*",
    dataset=r"[A-Za-z0-9][A-Za-z0-9._+-]*",


def pairs(pattern, **more):
    """Return `pattern` for every model and config of the run. more: other wildcards; by default the first seed."""
    more = {"seeded": ""} | more
    return [
        path
        for model, config in study.pairs()
        for path in expand(pattern, model=model, config=config, **more)
    ]


def loading(model):
    """Return the settings by which a model and all its pruned checkpoints are loaded."""
    chosen = study.models[model]
    always = {
        key: getattr(chosen, key) for key in ("dtype", "quantize", "trust_remote_code")
    }
    # only if they are set, so that models without them keep the results of earlier versions
    given = {key: getattr(chosen, key) for key in ("context_length", "eos_token")}
    return always | {key: value for key, value in given.items() if value is not None}


def needs(model):
    """Return what the study asks of a model, which is checked when the model is taken in."""
    chosen = study.models[model]
    named = ("context_length", "eos_token", "trust_remote_code", "prompt")
    asked = {key: getattr(chosen, key) for key in named}
    return asked | {"bos": study.needs_bos(model), "kind": chosen.kind}


def dated(form, evaluate):
    """Return {chat_date} if a chat template is used, else nothing: then nothing depends on the date."""
    chats = form == "chat" or evaluate.zero_shot.chat_template
    return {"chat_date": CHAT_DATE} if chats else {}


def reading(model):
    """Return the settings by which a model and its tokenizer are loaded where they read text."""
    return loading(model) | dated(prompt(model), study.evaluate_of(model))


@untracked
def placement(wildcards):
    """Return the device placement of the weights, as a rule parameter whose change reruns nothing."""
    return settings.rerun_policy.execution_settings(
        "models", study.models[wildcards.model].model_dump()
    )


def execution(section):
    """Return the execution settings of a model's section, as a rule parameter whose change reruns nothing."""
    of = {"finetune": study.finetune_of, "evaluate": study.evaluate_of}[section]
    once = functools.cache(
        lambda model: settings.rerun_policy.execution_settings(
            section, of(model).model_dump()
        )
    )
    return untracked(lambda wildcards: once(wildcards.model))


@untracked
def whole_grid(wildcards):
    """Return all grid points of a model, as a rule parameter whose change reruns nothing.

    A job checks them all before it works on one, so that nothing is fetched or pruned if any of them does not fit.
    """
    return study.candidates(wildcards.model) if PRUNES else {}


def prompt(model):
    """Return the prompt format of a model."""
    return study.models[model].prompt


def of_more_seeds(record):
    """Return the `record` of every training with an additional seed."""
    return [
        path
        for model, config in study.pairs()
        for seed in study.more_seeds(model)
        for path in expand(
            record, model=model, config=config, seeded=study.seed_folder(seed)
        )
    ]


if MAIN_PROCESS:
    select.forget_stale(
        [
            *pairs(PRUNED),
            *pairs(SEEDED),
            *of_more_seeds(SEEDED),
            *pairs(REPORTED_SEED),
            *of_more_seeds(REPORTED_SEED),
        ]
    )


def of_choice(pattern):
    """Return an input function for `pattern` with the candidate that the wildcards' config chose."""

    def inputs(wildcards):
        made = checkpoints.select_best.get(
            model=wildcards.model, config=wildcards.config
        )
        chosen = select.chosen(made.output[0])
        return pattern.format(candidate=chosen, **dict(wildcards.items()))

    return inspected_once(inputs)


@inspected_once
def selections_before(wildcards):
    """Return the selections of the configs before this one, which may have chosen the same candidate."""
    configs = list(study.criteria_of(wildcards.model))
    before = configs[: configs.index(wildcards.config)]
    return selections(wildcards.model, before)


def selections(model, configs):
    """Return a model's selections of configs. Those of configs that are not part of this run count if they exist."""
    active = study.active_configs()
    paths = {config: SELECTION.format(model=model, config=config) for config in configs}
    return [
        path
        for config, path in paths.items()
        if config in active or Path(path).exists()
    ]


@inspected_once
def weights(wildcards):
    """Return the fingerprint of a candidate's weights, or None until it is pruned.

    As a parameter it reruns the jobs that work on the candidate if the weights change. Its record as an input would
    also rerun them if the same weights are made again, because the record holds times.
    """
    return select.weights_of(CANDIDATE.format(**wildcards))


def latencies():
    """Return the latency record of every model of the run whose latency is measured."""
    return [
        LATENCY.format(model=model)
        for model in study.active_models()
        if study.evaluate_of(model).cost.enabled
    ]


def released():
    """Return the records of deleted weights, if weights are to be deleted."""
    return expand(RELEASED, model=study.active_models()) if DELETES_WEIGHTS else []


def status(stage, *key):
    """Return the path of a job's status file. Snakemake fills in wildcards in it, as in any parameter."""
    name = ".".join(filter(None, key)).replace(os.sep, "")
    return f"{RESULTS}/.status/{stage}/{name}.json"


SHARED = study.shares_candidate_jobs()
PRUNES = study.config.candidates.table is None
CANDIDATE_JOB = "{model}" if SHARED else "{model}.{candidate}"
# Weights are deleted only if all configs take part in the run: any other config could still choose any candidate
DELETES_WEIGHTS = study.config.candidates.keep == "selected" and (
    PRUNES and study.active_configs() == study.configs
)


def rows_of(purpose):
    """Return an input function for the gathered rows of a model's evaluation. purpose: report or selection.

    Models that are evaluated alike share them, so that a model with other data sets reruns nothing of theirs.
    """

    def rows(wildcards):
        model = wildcards.model
        shared = study.is_evaluated_alike(model)
        pattern = GATHERED_ROWS if shared else GATHERED_ROWS_OF_MODEL
        return pattern.format(purpose=purpose, model=model)

    return inspected_once(rows)


def produced(pattern):
    """Return the outputs of a prune or score job: those of one candidate, or of all candidates of a model."""
    if not SHARED:
        return [pattern]
    return [
        pattern.replace("{candidate}", name)
        for name in study.candidates(study.active_models()[0])
    ]


@inspected_once
def job_candidates(wildcards):
    """Return {name: grid point or table row} of the candidates that one job prunes or scores."""
    every = study.candidates(wildcards.model)
    return every if SHARED else {wildcards.candidate: every[wildcards.candidate]}


@functools.cache
def records_of(model):
    """Return {candidate: (its pruning.json, its scores or None)}, as a rule parameter."""
    return scoring.records(study, model)


def candidate_records(model):
    """Return the last record of each candidate of a model: its scores, or pruning.json if it is not scored."""
    return [scores or pruning for pruning, scores in records_of(model).values()]


def evaluated(folder):
    """Return the records of an evaluation in `folder`. Samples are not declared: the first record has their digests."""
    return {
        "evaluation": f"{folder}/evaluation_results.json",
        "perplexity": f"{folder}/ppl_results.json",
    }


def study_overview():
    """Return the lines that describe the study before the first job starts."""
    models, configs = study.active_models(), study.active_configs()
    made = sum(len(study.candidates(model)) for model in models)
    trained = len(study.pairs())
    product = f"{len(models)} models x {len(configs)} configs = {trained} fine-tunings"
    if trained < len(models) * len(configs):
        product = (
            f"{len(models)} models, {len(configs)} configs, {trained} fine-tunings"
        )
    lines = [
        f"Coppice: {product}, {made} candidates to choose from; results in {RESULTS}/",
        f"  models: {', '.join(models)}; configs: {', '.join(configs)}",
        "  jobs per stage: see the job stats above",
    ]
    notices = list(study.notices)
    if untested := snakemake_compat.untested_version():
        notices.append(untested)
    if unknown := sizes.unknown():
        notices.append(
            f"the size of {', '.join(unknown)} is unknown until it is fetched; until then its jobs request memory and "
            "time for 10^9 parameters. To avoid that, set models.X.parameters."
        )
    return "\n".join([*lines, *(f"  note: {notice}" for notice in notices)])


def check_shared_resources():
    """End the run if it would use a record that another study made with other settings under the same name."""
    used = snakemake_compat.used_outputs(workflow)
    for path, words in shared_resources.differing_records(study, files).items():
        if path in used:
            raise WorkflowError(
                f"{path}: {words}. Another study made it under the same name. Set resources to another folder, choose "
                "another name, or delete this record so that it is made again."
            )


def delete_partial_files():
    """Delete the partial files that killed jobs left, and return the lines that report it."""
    deleted = disks.sweep([RESULTS, RESOURCES])
    return (
        [f"  note: deleted {len(deleted)} partial files left by killed jobs"]
        if deleted
        else []
    )


def terminal():
    """Return a console on standard error, where Snakemake prints its own lines."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


def print_lines(*words):
    """Print lines to the terminal."""
    for word in words:
        terminal().print(word, soft_wrap=True)
