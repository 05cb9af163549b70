"""Evaluation of dense, pruned and fine-tuned models, by one script with the same settings.

Input: a model's record, a selection or a fine-tuning, and the report rows of every data set.
Output: `evaluation_results.json` and `ppl_results.json` in `{dense,pruned,finetuned}_evaluation/...`. Undeclared files
lie beside them: `samples/{task}.parquet`, whose digests are in the first record and are checked by every reader, and
`.parts/`, the finished parts from which a killed or extended evaluation continues.
"""

# All stages share these parameters, because only evaluations with equal settings can be compared
SAME_FOR_ALL_STAGES = {
    "settings": settings.rerun_policy.result_settings("evaluate", study.evaluate),
    "execution": execution("evaluate"),
    "datasets": files.by_name(EVALUATED),
    "loading": of_model(loading),
    "placement": placement,
    "prompt": of_model(prompt),
    "seed": study.seed,
    "protocol": 2,
}


rule evaluate:
    input:
        expand(f"{DENSE}/evaluation_results.json", model=study.active_models()),
        pairs(f"{PRUNED}/evaluation_results.json"),
        pairs(f"{REPORTED}/evaluation_results.json"),
        of_more_seeds(f"{REPORTED_SEED}/evaluation_results.json"),


rule evaluate_dense:
    input:
        model=of_model(files.model),
        rows=GATHERED_ROWS.format(purpose="report"),
    output:
        **evaluated(DENSE),
    log:
        f"{LOGS}/evaluate/dense.{{model}}.log",
    benchmark:
        f"{LOGS}/evaluate/dense.{{model}}.benchmark.tsv"
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job["evaluate"]
    resources:
        gpu=gpu_count("evaluate"),
        gpu_model=gpu_model("evaluate"),
        cpus_per_task=study.threads_per_job["evaluate"],
        mem_mb=requested("evaluate", "mem_mb"),
        gpu_mem_mb=requested("evaluate", "gpu_mem_mb"),
        disk_mb=requested("evaluate", "disk_mb"),
        runtime=requested("evaluate", "runtime"),
    params:
        **SAME_FOR_ALL_STAGES,
        stage="dense",
        status=status("evaluate", "dense", "{model}"),
    script:
        "../scripts/evaluate_model.py"


use rule evaluate_dense as evaluate_pruned with:
    input:
        dense=of_model(files.model),
        selection=SELECTION,
        rows=GATHERED_ROWS.format(purpose="report"),
        reuse=reusable(f"{PRUNED}/evaluation_results.json"),
    output:
        **evaluated(PRUNED),
    log:
        f"{LOGS}/evaluate/pruned.{{model}}.{{config}}.log",
    benchmark:
        f"{LOGS}/evaluate/pruned.{{model}}.{{config}}.benchmark.tsv"
    params:
        **SAME_FOR_ALL_STAGES,
        stage="pruned",
        status=status("evaluate", "pruned", "{model}", "{config}"),


use rule evaluate_dense as evaluate_finetuned with:
    input:
        dense=of_model(files.model),
        selection=SELECTION,
        adapter=f"{SEEDED}/adapter_model.safetensors",
        record=f"{SEEDED}/finetuning_config.json",
        rows=GATHERED_ROWS.format(purpose="report"),
        reuse=reusable(f"{REPORTED_SEED}/evaluation_results.json"),
    output:
        **evaluated(REPORTED_SEED),
    log:
        f"{LOGS}/evaluate/finetuned.{{model}}.{{config}}{{seeded}}.log",
    benchmark:
        f"{LOGS}/evaluate/finetuned.{{model}}.{{config}}{{seeded}}.benchmark.tsv"
    priority: PRIORITY["finetuned"]
    params:
        **SAME_FOR_ALL_STAGES,
        stage="finetuned",
        status=inspected_once(
            lambda wildcards: status("evaluate", "finetuned", *wildcards)
        ),
