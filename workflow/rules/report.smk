"""The study's report: answers, tables and figures, rendered from records alone.

Input: every comparison, the latencies and the table of candidates.
Output: `report/study_report.{html,md}`, `*.csv` and `figures/`.
"""


rule report:
    input:
        f"{REPORT}/study_report.html",


rule write_report:
    input:
        pairs(f"{REPORTED}/comparison.json"),
        table=f"{RESULTS}/candidates.tsv",
        summary=f"{RESULTS}/for_finetuning/SUMMARY.md",
        latencies=latencies(),
    output:
        html=report(
            f"{REPORT}/study_report.html",
            category="study",
            caption="../report/study.rst",
        ),
        page=f"{REPORT}/study_report.md",
        tables=expand(f"{REPORT}/{{table}}.csv", table=study_report.TABLES),
        figures=report(
            expand(
                f"{REPORT}/figures/{{figure}}.{{kind}}",
                figure=study_report.FIGURES,
                kind=["png", "svg"],
            ),
            category="figures",
            caption="../report/figure.rst",
        ),
    log:
        f"{LOGS}/report/write_report.log",
    conda:
        "../../envs/coppice.yaml"
    params:
        pairs=study.pairs(),
        models={
            name: {
                key: getattr(study.models[name], key)
                for key in ("variant", "family", "base")
            }
            for name in study.active_models()
        },
        seed=study.seed,
        status=status("report", "study"),
        protocol=1,
    script:
        "../scripts/write_report.py"
