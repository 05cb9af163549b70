"""Recovery: LoRA fine-tuning of each chosen candidate.

Input: the candidate's record and the instruction data.
Output: `by_candidate/{model}/{candidate}/finetuned/` with the adapter, its configuration and tokenizer,
`finetuning_config.json`, `training_log.txt` and `training_state.json`. The training's checkpoints lie beside them and
are not declared: Snakemake deletes declared outputs before a rerun, and a killed job needs the checkpoints to resume.
With `finetune.seeds`, each additional seed has the same files in `seed-<n>/` inside that folder.

`finetuned/{model}/{config}_finetuned/` shows the training of the candidate that the config chose: its files are links,
and its records name the config. Configs that choose the same candidate share one training.
"""


rule finetune:
    input:
        pairs(f"{FINETUNED}/finetuning_config.json"),
        of_more_seeds(f"{SEEDED}/finetuning_config.json"),


def training_rows(model):
    """Return the records of the data sets that a model is trained and validated on."""
    return files.datasets(study.training_datasets(model))


def teacher_record(model):
    """Return the record of the model that a model's candidates learn from, if there is one."""
    teacher = study.teacher_of(model)
    return [] if teacher is None else files.model(teacher)


def training_settings(model):
    """Return the settings of a model's trainings on which results depend, as a rule parameter."""
    section = settings.rerun_policy.result_settings(
        "finetune", study.finetune_of(model).model_dump()
    )
    teacher = study.teacher_of(model)
    # only if there is a teacher, so that trainings without one keep their parameters
    more = {} if teacher is None else {"teacher_loading": reading(teacher)}
    return section | {"seeds": None} | more


rule finetune_lora:
    input:
        candidate=ancient(CANDIDATE),
        datasets=of_model(training_rows),
        teacher=of_model(teacher_record),
    output:
        adapter=f"{TRAINING}/adapter_model.safetensors",
        adapter_config=f"{TRAINING}/adapter_config.json",
        record=f"{TRAINING}/finetuning_config.json",
        log=f"{TRAINING}/training_log.txt",
        state=f"{TRAINING}/training_state.json",
    log:
        f"{LOGS}/finetune/{{model}}.{{candidate}}{{seeded}}.log",
    benchmark:
        f"{LOGS}/finetune/{{model}}.{{candidate}}{{seeded}}.benchmark.tsv"
    priority: PRIORITY["finetune"]
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job.finetune
    resources:
        gpu=study.resources_per_job.finetune.gpu,
        gpu_model=gpu_model("finetune"),
        cpus_per_task=study.threads_per_job.finetune,
        mem_mb=requested("finetune", "mem_mb"),
        gpu_mem_mb=requested("finetune", "gpu_mem_mb"),
        disk_mb=requested("finetune", "disk_mb"),
        runtime=requested("finetune", "runtime"),
    params:
        settings=of_model(training_settings),
        execution=execution("finetune"),
        datasets=of_model(lambda model: files.by_name(study.training_datasets(model))),
        prompt=of_model(prompt),
        weights=weights,
        loading=of_model(reading),
        placement=placement,
        seed=inspected_once(
            lambda wildcards: study.seed_in(wildcards.model, wildcards.seeded)
        ),
        status=inspected_once(lambda wildcards: status("finetune", *wildcards)),
        protocol=2,
    script:
        "../scripts/finetune_lora.py"


rule link_training:
    input:
        adapter=of_choice(f"{TRAINING}/adapter_model.safetensors"),
        adapter_config=of_choice(f"{TRAINING}/adapter_config.json"),
        record=of_choice(f"{TRAINING}/finetuning_config.json"),
        log=of_choice(f"{TRAINING}/training_log.txt"),
        state=of_choice(f"{TRAINING}/training_state.json"),
        selections=selections_before,
        # Only the training needs the data, but before the config has chosen, Snakemake knows this job alone. The data is
        # fetched and checked at the start of the run, not after the selection.
        datasets=ancient(of_model(training_rows)),
    output:
        adapter=f"{SEEDED}/adapter_model.safetensors",
        adapter_config=f"{SEEDED}/adapter_config.json",
        record=f"{SEEDED}/finetuning_config.json",
        log=report(
            f"{SEEDED}/training_log.txt",
            category="fine-tuning",
            caption="../report/finetuning.rst",
            labels={"model": "{model}", "config": "{config}{seeded}"},
        ),
        state=f"{SEEDED}/training_state.json",
    log:
        f"{LOGS}/finetune/link.{{model}}.{{config}}{{seeded}}.log",
    priority: PRIORITY["choice"]
    localrule: True
    conda:
        "../../envs/coppice.yaml"
    params:
        status=inspected_once(lambda wildcards: status("link", "training", *wildcards)),
        protocol=1,
    script:
        "../scripts/link_results.py"
