"""What the rules share: the study, wildcard constraints, resources, and the words at a run's start and end.

The configuration is checked here, once, in the main process: a job that Snakemake starts on its own (a cluster's, or
one in a group) trusts it.
"""

import functools
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

SCRIPTS = str(Path(workflow.current_basedir).parent / "scripts")
sys.path.insert(0, SCRIPTS)

from coppice import (
    disks,
    gpus,
    jobs,
    large_studies,
    miniature,
    reporting,
    selection,
    settings,
    sizing,
)
from coppice.errors import CoppiceError
from coppice.large_studies import of_model, signed

jobs.run_from(SCRIPTS)
if workflow.is_main_process:
    jobs.begin_run()
try:
    study = settings.load(config, workflow.configfiles)
    # Snakemake knows its targets only after parsing; what on the command line is no target is ignored
    settings.check_targets(study, sys.argv[1:])
except CoppiceError as error:
    raise WorkflowError(str(error)) from None

# no parameters of rules: no result depends on them
gpus.configure(**study.config["gpus"], given=workflow.remote_exec)
if workflow.remote_exec:
    jobs.note_start()

large_studies.plan_quickly()

RESULTS, RESOURCES = study.results, study.resources
LOGS = "logs"

# The record or folder of each stage
CANDIDATE = f"{RESULTS}/candidates/{{model}}/{{candidate}}/pruning.json"
SCORED = f"{RESULTS}/candidate_evaluation/{{model}}/{{candidate}}"
SELECTION = f"{RESULTS}/for_finetuning/{{model}}/{{config}}/selection_info.json"
FINETUNED = f"{RESULTS}/finetuned/{{model}}/{{config}}_finetuned"
DENSE = f"{RESULTS}/dense_evaluation/{{model}}"
PRUNED = f"{RESULTS}/pruned_evaluation/{{model}}/{{config}}"
REPORTED = f"{RESULTS}/finetuned_evaluation/{{model}}/{{config}}_finetuned"
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
    large_studies.forget_stale(GATHERED)


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


def dataset_record(name):
    """The record of the prepared dataset `name`: generated ones share one folder, others have their own."""
    entry = study.dataset(name)
    if entry and entry["source"]["kind"] == "miniature":
        return (
            f"{RESOURCES}/miniature/{Path(entry['source']['path']).name}/dataset.json"
        )
    return f"{RESOURCES}/datasets/{name}/dataset.json"


def dataset_records(names):
    """Records of several datasets, as a list of inputs."""
    return [dataset_record(name) for name in names]


def by_name(names):
    """name -> record path, as a rule parameter."""
    return {name: dataset_record(name) for name in names}


def model_record(model):
    """The record of a dense model's folder."""
    source = study.models[model]["source"]
    if source["kind"] == "miniature":
        return f"{RESOURCES}/miniature/models/{Path(source['path']).name}/model.json"
    return f"{RESOURCES}/models/{model}/model.json"


@functools.cache
def config_files():
    """model -> the configuration of each active model that is not made here: known before its weights are."""
    return {
        model: sizing.config_file(study, model)
        for model in study.active_models()
        if study.models[model]["source"]["kind"] != "miniature"
    }


@signed
def checked_grid(wildcards):
    """The record that the model takes a job's points of the grid, where that is checked."""
    return GRID.format(**wildcards) if wildcards.model in config_files() else []


def hub_configs():
    """Those of them that have to be fetched, where a grid is checked against them."""
    if study.config["candidates"]["table"] is not None:
        return []
    return [
        path
        for model, path in config_files().items()
        if study.models[model]["source"]["kind"] == "hub"
    ]


def loading(model):
    """How a model and all its pruned forms are loaded."""
    return {
        key: study.models[model][key]
        for key in ("dtype", "quantize", "trust_remote_code")
    }


# What decides no number goes to jobs by parameters that are functions of their output: Snakemake takes those to follow
# from it, and compares them with no earlier run


def placement(wildcards, output):
    """Where the weights are put, as a rule parameter whose change reruns nothing."""
    return settings.effects.handling("models", study.models[wildcards.model])


def handling(section):
    """How the work of a section is done, as a rule parameter whose change reruns nothing."""
    values = settings.effects.handling(section, study.config[section])
    return lambda wildcards, output: values


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
    return selection.trained(paths)


def of_twin(record):
    """The `record` of the config that chose the same candidate and is trained for all that did, where that is not this
    one: what was trained and evaluated for it is taken over. Known once all configs have chosen.
    """

    def inputs(wildcards):
        before = trained_before(wildcards.model)
        chosen = dict(before)  # outside this run, what is trained counts
        for config in {*study.active_configs(), wildcards.config}:
            made = checkpoints.select_best.get(model=wildcards.model, config=config)
            chosen[config] = selection.chosen(made.output[0])
        alike = [c for c in study.configs if chosen.get(c) == chosen[wildcards.config]]
        owner = selection.owner(
            f"{RESULTS}/.owners/{wildcards.model}.json",
            chosen[wildcards.config],
            alike,
            before,
            decide=workflow.is_main_process,
        )
        if owner == wildcards.config:
            return []
        return [record.format(**dict(wildcards.items()) | {"config": owner})]

    return signed(inputs)


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
# What a job's points are checked in. One record a job: were it one a model, and `ancient` to jobs whose points are as they
# were, Snakemake would skip all that rests on it in the run that checks it anew
GRID = f"{RESULTS}/candidates/{{model}}/" + (
    "grid.json" if SHARED else ".grid/{candidate}.json"
)
RELEASES = study.config["candidates"]["keep"] == "selected" and (
    study.config["candidates"]["table"] is None
    and study.active_configs() == list(study.configs)
)  # weights that a config may still choose are kept
EVALUATED = list(dict.fromkeys([*study.evaluate["perplexity"]["datasets"], *TASKS]))


def scoring_settings():
    """How candidates are scored: as reports are, but of the texts only those that a criterion asks for, under the
    protocol that stands for a model, and without its answers and its cost."""
    asked = [
        metric.removeprefix("ppl.")
        for criterion in study.configs.values()
        for metric in selection.asked(criterion)
    ]
    texts = study.evaluate["perplexity"]["datasets"]
    chosen = [name for name in texts if name in asked] or texts
    return settings.effects.deciding(
        "evaluate", settings.effects.narrowed(study.evaluate, chosen)
    )


def scored_datasets():
    """Names of the datasets that candidates are scored on."""
    return list(dict.fromkeys([*scoring_settings()["perplexity"]["datasets"], *TASKS]))


def own_tasks():
    """The files of the user's own task definitions, as inputs: a change of theirs is noticed."""
    folder = study.evaluate["zero_shot"]["include_path"]
    files = Path(folder).rglob("*") if folder else []
    return sorted(str(file) for file in files if file.suffix in (".yaml", ".py"))


def needs_selection(dataset):
    """Whether candidates are scored here on rows of `dataset`."""
    scored = any(
        selection.needs_scoring(candidate, study.configs)
        for model in study.active_models()
        for candidate in study.candidates(model).values()
    )
    if dataset in study.ablated_by():
        return True
    return scored and dataset in scored_datasets()


def local_files(source):
    """The files of a local model or dataset, as inputs: a change of theirs is noticed."""
    if source is None or source["kind"] != "local":
        return []
    path = Path(source["path"])
    return (
        sorted(str(file) for file in path.iterdir() if file.is_file())
        if path.is_dir()
        else [str(path)]
    )


def miniature_corpus():
    """The records of the text that the miniature models are trained on."""
    corpus = study.miniature["corpus"]
    if corpus != "world":
        return [dataset_record(corpus)]
    return expand(
        f"{RESOURCES}/miniature/{{dataset}}/dataset.json",
        dataset=["pretraining", "wikitext2", "ptb"],
    )


def miniature_parents(name):
    """What a miniature model is built from beside the corpus: for an instruct one its base and the instructions."""
    if not name.endswith("-instruct"):
        return []
    base = f"{RESOURCES}/miniature/models/{name.removesuffix('-instruct')}/model.json"
    return [base, dataset_record(study.training_datasets()[0])]


@functools.cache
def folders(model):
    """candidate -> (its pruning.json, its scores or None where its table row has all that is asked for)."""
    return {
        name: (
            CANDIDATE.format(model=model, candidate=name),
            (
                f"{SCORED}/evaluation_results.json".format(model=model, candidate=name)
                if selection.needs_scoring(candidate, study.configs)
                else None
            ),
        )
        for name, candidate in study.candidates(model).items()
    }


def produced(pattern):
    """The outputs of one candidate job: of one candidate, or of a model's whole grid where its jobs are shared."""
    if not SHARED:
        return [pattern]
    return [
        pattern.replace("{candidate}", name)
        for name in study.candidates(study.active_models()[0])
    ]


@signed
def job_candidates(wildcards):
    """name -> grid point or table row of the candidates that one job makes or scores."""
    every = study.candidates(wildcards.model)
    return every if SHARED else {wildcards.candidate: every[wildcards.candidate]}


def candidate_records(model):
    """The last record of each of a model's candidates: its scores, which its pruning precedes, where it has any."""
    return [scores or pruning for pruning, scores in folders(model).values()]


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


def cleared():
    """What is said of files that killed jobs left half-written: they go before the first job."""
    swept = disks.sweep([RESULTS, RESOURCES])
    return (
        [f"  note: {len(swept)} half-written files of killed jobs are removed"]
        if swept
        else []
    )


def tell(*words):
    """Print to the terminal, beside Snakemake's own lines."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    for word in words:
        console.print(word)
