"""Models and data sets, each stored in one common form under `resources`.

Input: hub ids, local folders or `miniature/...` names.
Output: `model.json` for each model and `dataset.json` for each data set, beside their files, and the `config.json` of
each model, which is fetched before the weights and against which the pruning grid is checked. Only the fetch rules use the
network. `gather_rows` lists the records of all data sets of an evaluation in one file, so that each of ten thousand jobs
has one input instead of ten.
"""


def dataset_entry(name):
    """Return the settings of a data set; None for a task without an entry, which uses its official data."""
    entry = study.dataset(name)
    return entry and entry.model_dump()


# Fetches everything that comes from the hub; run this target on a machine with a network
rule fetch:
    input:
        [files.model(model) for model in study.active_models()],
        [files.checked_configuration(model) for model in study.active_models()],
        files.datasets(
            list(dict.fromkeys([*study.datasets, *study.measured_datasets()]))
        ),
    localrule: True


rule fetch_model:
    input:
        lambda wildcards: layout.local_files(study.models[wildcards.model].source),
    output:
        f"{RESOURCES}/models/{{model}}/model.json",
    log:
        f"{LOGS}/data/fetch_model.{{model}}.log",
    localrule: True
    conda:
        "../../envs/coppice.yaml"
    resources:
        disk_mb=weights_on_disk,
    params:
        source=lambda wildcards: study.models[wildcards.model].source.model_dump(),
        revision=lambda wildcards: study.models[wildcards.model].revision,
        # These are only checked and do not change what is fetched.
        prompt=untracked(lambda wildcards: prompt(wildcards.model)),
        needs=untracked(lambda wildcards: needs(wildcards.model)),
        loading=untracked(lambda wildcards: loading(wildcards.model)),
        training=untracked(
            lambda wildcards: study.finetune_of(wildcards.model).model_dump()
        ),
    script:
        "../scripts/fetch_model.py"


# config.json is small, and it is enough to size jobs and to check the pruning grid before the weights are here
rule fetch_config:
    input:
        of_model(files.local_configuration),
    output:
        f"{RESOURCES}/models/{{model}}/config.json",
    log:
        f"{LOGS}/data/fetch_config.{{model}}.log",
    priority: 100
    localrule: True
    conda:
        "../../envs/coppice.yaml"
    params:
        source=lambda wildcards: study.models[wildcards.model].source.model_dump(),
        revision=lambda wildcards: study.models[wildcards.model].revision,
        whole_grid=whole_grid,
        # This is only checked and does not change what is fetched.
        kind=untracked(lambda wildcards: study.models[wildcards.model].kind),
    script:
        "../scripts/fetch_config.py"


rule fetch_dataset:
    input:
        lambda wildcards: files.dataset_sources(wildcards.dataset),
    output:
        f"{RESOURCES}/datasets/{{dataset}}/dataset.json",
    log:
        f"{LOGS}/data/fetch_dataset.{{dataset}}.log",
    localrule: True
    conda:
        "../../envs/coppice.yaml"
    params:
        entry=lambda wildcards: dataset_entry(wildcards.dataset),
        needs_selection=lambda wildcards: scoring.needs_rows_of(
            study, wildcards.dataset
        ),
        include_path=lambda wildcards: (
            study.evaluate.zero_shot.include_path
            if study.dataset(wildcards.dataset) is None
            else None
        ),
        # This is only checked and does not change what is read.
        own_task=untracked(lambda wildcards: study.defines(wildcards.dataset)),
        protocol=1,
    script:
        "../scripts/fetch_dataset.py"


def one_evaluated_alike():
    """Return a model that is evaluated by the study's own section; all such models are scored alike."""
    return next(model for model in study.models if study.is_evaluated_alike(model))


rule gather_rows:
    input:
        lambda wildcards: files.datasets(
            measured_on(study.evaluate)
            if wildcards.purpose == "report"
            else scoring.datasets(study, one_evaluated_alike())
        ),
        files.task_definitions(),
    output:
        GATHERED_ROWS,
    log:
        f"{LOGS}/data/gather_rows.{{purpose}}.log",
    wildcard_constraints:
        purpose="report|selection",
    priority: PRIORITY["choice"]
    localrule: True
    conda:
        "../../envs/coppice.yaml"
    script:
        "../scripts/gather_files.py"


use rule gather_rows as gather_rows_of_model with:
    input:
        lambda wildcards: files.datasets(
            measured_on(study.evaluate_of(wildcards.model))
            if wildcards.purpose == "report"
            else scoring.datasets(study, wildcards.model)
        ),
        lambda wildcards: (
            files.task_definitions()
            if study.evaluate_of(wildcards.model).zero_shot.tasks
            else []
        ),
    output:
        GATHERED_ROWS_OF_MODEL,
    log:
        f"{LOGS}/data/gather_rows.{{model}}.{{purpose}}.log",


rule build_miniature_world:
    output:
        expand(
            f"{RESOURCES}/miniature/{{dataset}}/dataset.json",
            dataset=miniature.DATASETS,
        ),
    log:
        f"{LOGS}/data/build_miniature_world.log",
    benchmark:
        f"{LOGS}/data/build_miniature_world.benchmark.tsv"
    conda:
        "../../envs/coppice.yaml"
    params:
        seed=study.seed,
        protocol=miniature.PROTOCOL,
    script:
        "../scripts/build_miniature_world.py"


rule build_miniature_model:
    input:
        corpus=files.miniature_corpus(),
        parents=lambda wildcards: files.miniature_parents(wildcards.miniature),
    output:
        f"{RESOURCES}/miniature/models/{{miniature}}/model.json",
    log:
        f"{LOGS}/data/build_miniature_model.{{miniature}}.log",
    benchmark:
        f"{LOGS}/data/build_miniature_model.{{miniature}}.benchmark.tsv"
    wildcard_constraints:
        miniature=r"(llama|qwen|mistral)(-instruct)?",
    priority: PRIORITY["build"]
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job.build
    resources:
        cpus_per_task=study.threads_per_job.build,
        mem_mb=2000,
        runtime=30,
    params:
        steps=study.miniature.steps,
        context=study.miniature.context,
        seed=study.seed,
        protocol=miniature.PROTOCOL,
    script:
        "../scripts/build_miniature_model.py"


rule build_miniature_pictures:
    output:
        expand(
            f"{RESOURCES}/miniature/{{dataset}}/dataset.json",
            dataset=registry.PICTURE_DATASETS,
        ),
    log:
        f"{LOGS}/data/build_miniature_pictures.log",
    benchmark:
        f"{LOGS}/data/build_miniature_pictures.benchmark.tsv"
    priority: PRIORITY["build"]
    conda:
        "../../envs/coppice.yaml"
    params:
        seed=study.seed,
        protocol=miniature.PICTURES_PROTOCOL,
    script:
        "../scripts/build_miniature_pictures.py"


rule build_miniature_code:
    output:
        expand(
            f"{RESOURCES}/miniature/{{dataset}}/dataset.json",
            dataset=registry.CODE_DATASETS,
        ),
    log:
        f"{LOGS}/data/build_miniature_code.log",
    benchmark:
        f"{LOGS}/data/build_miniature_code.benchmark.tsv"
    priority: PRIORITY["build"]
    conda:
        "../../envs/coppice.yaml"
    params:
        seed=study.seed,
        protocol=miniature.CODE_PROTOCOL,
    script:
        "../scripts/build_miniature_code.py"


rule build_miniature_kind:
    input:
        lambda wildcards: [
            files.generated(dataset)
            for dataset in miniature.KIND_MODELS[wildcards.miniature].datasets
        ],
    output:
        f"{RESOURCES}/miniature/models/{{miniature}}/model.json",
    log:
        f"{LOGS}/data/build_miniature_model.{{miniature}}.log",
    benchmark:
        f"{LOGS}/data/build_miniature_model.{{miniature}}.benchmark.tsv"
    wildcard_constraints:
        miniature="|".join(miniature.KIND_MODELS),
    priority: PRIORITY["build"]
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job.build
    resources:
        cpus_per_task=study.threads_per_job.build,
        mem_mb=2000,
        runtime=30,
    params:
        steps=study.miniature.steps,
        seed=study.seed,
        protocol=miniature.KINDS_PROTOCOL,
    script:
        "../scripts/build_miniature_kind.py"
