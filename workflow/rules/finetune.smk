"""Recovery: LoRA fine-tuning of each chosen checkpoint.

Takes a selection and the instruction data; gives `finetuned/{model}/{config}_finetuned/`: the adapter with its
configuration and tokenizer, `finetuning_config.json`, `training_log.txt`, `training_state.json`. The checkpoints of
the training stay beside them undeclared, so that a killed job resumes.
"""


rule finetune:
    input:
        pairs(f"{FINETUNED}/finetuning_config.json"),


rule finetune_lora:
    input:
        selection=SELECTION,
        datasets=dataset_records(study.training_datasets()),
        twin=of_twin(f"{FINETUNED}/finetuning_config.json"),
    output:
        adapter=f"{FINETUNED}/adapter_model.safetensors",
        adapter_config=f"{FINETUNED}/adapter_config.json",
        record=f"{FINETUNED}/finetuning_config.json",
        log=f"{FINETUNED}/training_log.txt",
        state=f"{FINETUNED}/training_state.json",
    log:
        f"{LOGS}/finetune/{{model}}.{{config}}.log",
    benchmark:
        f"{LOGS}/finetune/{{model}}.{{config}}.benchmark.tsv"
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job["finetune"]
    resources:
        gpu=gpus("finetune"),
        cpus_per_task=study.threads_per_job["finetune"],
        mem_mb=memory("finetune"),
        runtime=runtime("finetune"),
    params:
        settings=study.finetune,
        datasets=by_name(study.training_datasets()),
        processes=lambda wildcards: training_processes(wildcards.model),
        prompt=lambda wildcards: study.models[wildcards.model]["prompt"],
        loading=lambda wildcards: loading(wildcards.model),
        seed=(study.finetune["seeds"] or [study.seed])[0],
        status=lambda wildcards: status("finetune", wildcards.model, wildcards.config),
        protocol=2,
    script:
        "../scripts/finetune_lora.py"
