"""Recovery: LoRA fine-tuning of each chosen checkpoint.

Input: a selection and the instruction data.
Output: `finetuned/{model}/{config}_finetuned/` with the adapter, its configuration and tokenizer,
`finetuning_config.json`, `training_log.txt` and `training_state.json`. The training's checkpoints lie beside them and
are not declared: Snakemake deletes declared outputs before a rerun, and a killed job needs the checkpoints to resume.
With `finetune.seeds`, each additional seed has the same files in `seed-<n>/` inside that folder.
"""


rule finetune:
    input:
        pairs(f"{FINETUNED}/finetuning_config.json"),
        of_more_seeds(f"{SEEDED}/finetuning_config.json"),


rule finetune_lora:
    input:
        selection=SELECTION,
        datasets=files.datasets(study.training_datasets()),
        reuse=reusable(f"{SEEDED}/finetuning_config.json"),
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
        f"{LOGS}/finetune/{{model}}.{{config}}{{seeded}}.log",
    benchmark:
        f"{LOGS}/finetune/{{model}}.{{config}}{{seeded}}.benchmark.tsv"
    priority: PRIORITY["finetune"]
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job["finetune"]
    resources:
        gpu=gpu_count("finetune"),
        gpu_model=gpu_model("finetune"),
        cpus_per_task=study.threads_per_job["finetune"],
        mem_mb=requested("finetune", "mem_mb"),
        gpu_mem_mb=requested("finetune", "gpu_mem_mb"),
        disk_mb=requested("finetune", "disk_mb"),
        runtime=requested("finetune", "runtime"),
    params:
        settings=settings.rerun_policy.result_settings("finetune", study.finetune)
        | {"seeds": None},
        execution=execution("finetune"),
        datasets=files.by_name(study.training_datasets()),
        prompt=of_model(prompt),
        loading=of_model(loading),
        placement=placement,
        seed=inspected_once(lambda wildcards: study.seed_in(wildcards.seeded)),
        status=inspected_once(lambda wildcards: status("finetune", *wildcards)),
        protocol=2,
    script:
        "../scripts/finetune_lora.py"
