"""Comparison of one model and config before and after fine-tuning.

Input: the three evaluations (and those of additional seeds), the selection and the fine-tuning record.
Output: `comparison_report.txt` for people and `comparison.json` for programs.
"""


rule compare:
    input:
        pairs(f"{REPORTED}/comparison_report.txt"),


rule compare_stages:
    input:
        dense=f"{DENSE}/evaluation_results.json",
        pruned=f"{PRUNED}/evaluation_results.json",
        finetuned=f"{REPORTED}/evaluation_results.json",
        selection=SELECTION,
        finetuning=f"{FINETUNED}/finetuning_config.json",
        seeds=inspected_once(
            lambda wildcards: [
                REPORTED.format(**dict(wildcards.items()))
                + f"{study.seed_folder(seed)}/evaluation_results.json"
                for seed in study.more_seeds(wildcards.model)
            ]
        ),
    output:
        report=report(
            f"{REPORTED}/comparison_report.txt",
            category="comparison",
            caption="../report/comparison.rst",
            labels={"model": "{model}", "config": "{config}"},
        ),
        record=f"{REPORTED}/comparison.json",
    log:
        f"{LOGS}/compare/{{model}}.{{config}}.log",
    conda:
        "../../envs/coppice.yaml"
    params:
        seed=study.seed,
        seeds=of_model(study.training_seeds),
        status=status("compare", "{model}", "{config}"),
        protocol=2,
    script:
        "../scripts/compare_stages.py"
