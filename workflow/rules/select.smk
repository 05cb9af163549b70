"""Selection: candidates are scored on rows that the reports never use, and each config chooses its best candidate.

Input: the candidates' records.
Output: `candidate_evaluation/{model}/{candidate}/evaluation_results.json` for candidates that lack a needed metric
(undeclared losses and samples lie beside it), `for_finetuning/{model}/{config}/` (`selection_info.json` and the linked
checkpoint), `candidates.tsv`, and `for_finetuning/SUMMARY.md` with its figures. `gather_candidates` lists all records
of a model's candidates in one input for the jobs that choose among them.

The choice is a Snakemake checkpoint: if two configs choose the same candidate, it is trained and evaluated once. With
`candidates.keep: selected`, the weights of the other candidates are deleted at the end;
`candidates/{model}/released.json` lists them.
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
        rows=rows_of("selection"),
    output:
        produced(f"{SCORED}/evaluation_results.json"),
    log:
        f"{LOGS}/select/score.{CANDIDATE_JOB}.log",
    benchmark:
        f"{LOGS}/select/score.{CANDIDATE_JOB}.benchmark.tsv"
    priority: PRIORITY["score"]
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job.evaluate
    resources:
        gpu=study.resources_per_job.evaluate.gpu,
        gpu_model=gpu_model("evaluate"),
        cpus_per_task=study.threads_per_job.evaluate,
        mem_mb=requested("score", "mem_mb"),
        gpu_mem_mb=requested("score", "gpu_mem_mb"),
        disk_mb=requested("score", "disk_mb"),
        runtime=requested("score", "runtime"),
    params:
        settings=of_model(lambda model: scoring.settings(study, model)),
        execution=execution("evaluate"),
        datasets=of_model(lambda model: files.by_name(scoring.datasets(study, model))),
        purpose=study.select.split,
        # Scoring asks no questions in the prompt's form, so only tasks in a chat template depend on the date
        loading=of_model(
            lambda model: loading(model) | dated("none", study.evaluate_of(model))
        ),
        placement=placement,
        seed=study.seed,
        candidates=inspected_once(lambda wildcards: list(job_candidates(wildcards))),
        status=status("select", CANDIDATE_JOB),
        protocol=2,
    script:
        "../scripts/score_candidate.py"


rule gather_candidates:
    input:
        of_model(candidate_records),
    output:
        GATHERED_CANDIDATES,
    log:
        f"{LOGS}/select/gather.{{model}}.log",
    priority: PRIORITY["choice"]
    localrule: True
    conda:
        "../../envs/coppice.yaml"
    script:
        "../scripts/gather_files.py"


checkpoint select_best:
    input:
        GATHERED_CANDIDATES,
    output:
        SELECTION,
    log:
        f"{LOGS}/select/{{model}}.{{config}}.log",
    priority: PRIORITY["choice"]
    conda:
        "../../envs/coppice.yaml"
    params:
        criterion=lambda wildcards: study.criteria_of(wildcards.model)[
            wildcards.config
        ]
        | {"split": study.select.split},
        folders=of_model(records_of),
        seed=study.seed,
        status=status("select", "{model}", "{config}"),
        protocol=2,
    script:
        "../scripts/select_best.py"


rule summarize_selection:
    input:
        candidates=expand(GATHERED_CANDIDATES, model=study.active_models()),
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
        folders={model: records_of(model) for model in study.active_models()},
        protocol=2,
    script:
        "../scripts/summarize_selection.py"


rule release_weights:
    input:
        candidates=GATHERED_CANDIDATES,
        selections=lambda wildcards: expand(
            SELECTION,
            model=wildcards.model,
            config=study.criteria_of(wildcards.model),
        ),
    output:
        RELEASED,
    log:
        f"{LOGS}/select/release.{{model}}.log",
    conda:
        "../../envs/coppice.yaml"
    params:
        folders=lambda wildcards: {
            name: paths[0] for name, paths in records_of(wildcards.model).items()
        },
        protocol=1,
    script:
        "../scripts/release_weights.py"
