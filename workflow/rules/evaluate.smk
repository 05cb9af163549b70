"""Evaluation of dense, pruned and fine-tuned models, by one script with the same settings.

Input: a model's record, a candidate's record or a fine-tuning, and the report rows of every data set.
Output: `evaluation_results.json` and `ppl_results.json` in `dense_evaluation/{model}/` and in
`by_candidate/{model}/{candidate}/{pruned,finetuned}_evaluation/`. Undeclared files lie beside them:
`samples/{task}.parquet`, whose digests are in the first record and are checked by every reader, and `.parts/`, the
finished parts from which a killed or extended evaluation continues. `latency/{model}/latency.json` holds the latencies of
a dense model and its chosen candidates, which one job measures in turns.

`pruned_evaluation/{model}/{config}/` and `finetuned_evaluation/{model}/{config}_finetuned/` show the evaluations of the
candidate that the config chose: the samples are links, and the records name the config.
"""

# All stages share these parameters, because only evaluations with equal settings can be compared
SAME_FOR_ALL_STAGES = {
    "settings": of_model(
        lambda model: settings.rerun_policy.result_settings(
            "evaluate", study.evaluate_of(model).model_dump()
        )
    ),
    "execution": execution("evaluate"),
    "datasets": of_model(
        lambda model: files.by_name(measured_on(study.evaluate_of(model)))
    ),
    "loading": of_model(reading),
    "placement": placement,
    "prompt": of_model(prompt),
    "seed": study.seed,
    "protocol": 3,
}


rule evaluate:
    input:
        expand(f"{DENSE}/evaluation_results.json", model=study.active_models()),
        pairs(f"{PRUNED}/evaluation_results.json"),
        pairs(f"{REPORTED}/evaluation_results.json"),
        of_more_seeds(f"{REPORTED_SEED}/evaluation_results.json"),
        latencies(),


rule evaluate_dense:
    input:
        model=of_model(files.model),
        rows=rows_of("report"),
    output:
        **evaluated(DENSE),
    log:
        f"{LOGS}/evaluate/dense.{{model}}.log",
    benchmark:
        f"{LOGS}/evaluate/dense.{{model}}.benchmark.tsv"
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job.evaluate
    resources:
        gpu=study.resources_per_job.evaluate.gpu,
        gpu_model=gpu_model("evaluate"),
        cpus_per_task=study.threads_per_job.evaluate,
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
        candidate=ancient(CANDIDATE),
        rows=rows_of("report"),
    output:
        **evaluated(EVALUATED_PRUNED),
    log:
        f"{LOGS}/evaluate/pruned.{{model}}.{{candidate}}.log",
    benchmark:
        f"{LOGS}/evaluate/pruned.{{model}}.{{candidate}}.benchmark.tsv"
    params:
        **SAME_FOR_ALL_STAGES,
        stage="pruned",
        weights=weights,
        status=status("evaluate", "pruned", "{model}", "{candidate}"),


use rule evaluate_dense as evaluate_finetuned with:
    input:
        dense=of_model(files.model),
        candidate=ancient(CANDIDATE),
        adapter=f"{TRAINING}/adapter_model.safetensors",
        record=f"{TRAINING}/finetuning_config.json",
        rows=rows_of("report"),
    output:
        **evaluated(EVALUATED_FINETUNED),
    log:
        f"{LOGS}/evaluate/finetuned.{{model}}.{{candidate}}{{seeded}}.log",
    benchmark:
        f"{LOGS}/evaluate/finetuned.{{model}}.{{candidate}}{{seeded}}.benchmark.tsv"
    priority: PRIORITY["finetuned"]
    params:
        **SAME_FOR_ALL_STAGES,
        stage="finetuned",
        weights=weights,
        status=inspected_once(
            lambda wildcards: status("evaluate", "finetuned", *wildcards)
        ),


use rule link_training as link_pruned with:
    input:
        record=of_choice(f"{EVALUATED_PRUNED}/evaluation_results.json"),
        perplexity=of_choice(f"{EVALUATED_PRUNED}/ppl_results.json"),
        selections=selections_before,
    output:
        **evaluated(PRUNED),
    log:
        f"{LOGS}/evaluate/link.pruned.{{model}}.{{config}}.log",
    params:
        status=status("link", "pruned", "{model}", "{config}"),
        protocol=1,


use rule link_training as link_finetuned with:
    input:
        record=of_choice(f"{EVALUATED_FINETUNED}/evaluation_results.json"),
        perplexity=of_choice(f"{EVALUATED_FINETUNED}/ppl_results.json"),
        selections=selections_before,
        # so that whoever requests an evaluation also finds the training that it measured
        training=f"{SEEDED}/finetuning_config.json",
    output:
        **evaluated(REPORTED_SEED),
    log:
        f"{LOGS}/evaluate/link.finetuned.{{model}}.{{config}}{{seeded}}.log",
    params:
        status=inspected_once(lambda wildcards: status("link", "finetuned", *wildcards)),
        protocol=1,


rule measure_latency:
    input:
        dense=of_model(files.model),
        selections=of_model(lambda model: selections(model, study.criteria_of(model))),
    output:
        LATENCY,
    log:
        f"{LOGS}/evaluate/latency.{{model}}.log",
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job.evaluate
    resources:
        gpu=study.resources_per_job.evaluate.gpu,
        gpu_model=gpu_model("evaluate"),
        cpus_per_task=study.threads_per_job.evaluate,
        mem_mb=requested("latency", "mem_mb"),
        gpu_mem_mb=requested("latency", "gpu_mem_mb"),
        disk_mb=requested("latency", "disk_mb"),
        runtime=requested("latency", "runtime"),
    params:
        cost=of_model(lambda model: study.evaluate_of(model).cost.model_dump()),
        loading=of_model(loading),
        placement=placement,
        status=status("latency", "{model}"),
        protocol=1,
    script:
        "../scripts/measure_latency.py"
