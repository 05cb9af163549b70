"""The choice: candidates are scored on rows that the reports never use, and each config picks its best.

Takes the candidates' records; gives `candidate_evaluation/{model}/{candidate}/evaluation_results.json` for those
without numbers of their own, `for_finetuning/{model}/{config}/` (`selection_info.json` and the linked checkpoint),
`candidates.tsv` and `for_finetuning/SUMMARY.md` with its figures. The choice is a checkpoint of the workflow: where two
configs choose the same candidate, what follows is done once. With `candidates.keep: selected` the weights of the others
go at last; `candidates/{model}/released.json` says which.
"""


rule select:
    input:
        pairs(SELECTION),
        f"{RESULTS}/candidates.tsv",
        f"{RESULTS}/for_finetuning/SUMMARY.md",
        released(),


rule score_candidate:
    input:
        pruning=produced(CANDIDATE),
        datasets=dataset_records(scored_datasets()),
        definitions=own_tasks(),
    output:
        evaluation=produced(f"{SCORED}/evaluation_results.json"),
        perplexity=produced(f"{SCORED}/ppl_results.json"),
        samples=[
            path
            for task in TASKS
            for path in produced(f"{SCORED}/samples/{task}.parquet")
        ],
    log:
        f"{LOGS}/select/score.{CANDIDATE_JOB}.log",
    benchmark:
        f"{LOGS}/select/score.{CANDIDATE_JOB}.benchmark.tsv"
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job["evaluate"]
    resources:
        gpu=gpu_count("evaluate"),
        gpu_model=gpu_model("evaluate"),
        cpus_per_task=study.threads_per_job["evaluate"],
        mem_mb=asked("score", "mem_mb"),
        gpu_mem_mb=asked("score", "gpu_mem_mb"),
        disk_mb=asked("score", "disk_mb"),
        runtime=asked("score", "runtime"),
    params:
        settings=scoring_settings(),
        datasets=by_name(scored_datasets()),
        purpose=study.select["split"],
        loading=lambda wildcards: loading(wildcards.model),
        seed=study.seed,
        candidates=lambda wildcards: list(job_candidates(wildcards)),
        status=lambda wildcards: status("select", *wildcards),
        protocol=1,
    script:
        "../scripts/score_candidate.py"


checkpoint select_best:
    input:
        lambda wildcards: candidate_records(wildcards.model),
    output:
        SELECTION,
    log:
        f"{LOGS}/select/{{model}}.{{config}}.log",
    conda:
        "../../envs/coppice.yaml"
    params:
        criterion=lambda wildcards: study.configs[wildcards.config]
        | {"split": study.select["split"]},
        folders=lambda wildcards: folders(wildcards.model),
        seed=study.seed,
        status=lambda wildcards: status("select", wildcards.model, wildcards.config),
        protocol=2,
    script:
        "../scripts/select_best.py"


rule summarize_selection:
    input:
        candidates=[
            path
            for model in study.active_models()
            for path in candidate_records(model)
        ],
        selections=pairs(SELECTION),
    output:
        table=f"{RESULTS}/candidates.tsv",
        page=report(
            f"{RESULTS}/for_finetuning/SUMMARY.md",
            category="selection",
            caption="../report/selection.rst",
        ),
        figures=report(
            expand(
                f"{RESULTS}/for_finetuning/figures/{{model}}.{{kind}}",
                model=study.active_models(),
                kind=["png", "svg"],
            ),
            category="selection",
            caption="../report/figure.rst",
        ),
    log:
        f"{LOGS}/select/summarize.log",
    conda:
        "../../envs/coppice.yaml"
    params:
        folders={model: folders(model) for model in study.active_models()},
        protocol=2,
    script:
        "../scripts/summarize_selection.py"


rule release_weights:
    input:
        candidates=lambda wildcards: candidate_records(wildcards.model),
        selections=lambda wildcards: expand(
            SELECTION, model=wildcards.model, config=study.configs
        ),
    output:
        RELEASED,
    log:
        f"{LOGS}/select/release.{{model}}.log",
    conda:
        "../../envs/coppice.yaml"
    params:
        folders=lambda wildcards: {
            name: paths[0] for name, paths in folders(wildcards.model).items()
        },
        protocol=1,
    script:
        "../scripts/release_weights.py"
