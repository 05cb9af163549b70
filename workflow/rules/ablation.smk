"""Ablations of the fine-tuning: arms train one checkpoint at an equal budget and are compared on held-out data.

Input: the start of each ablation (a selection, a dense model or a checkpoint folder) and the data.
Output: `ablation/{ablation}/{arm}/seed-{seed}/` (a training with its evaluations, summarized in `arm.json`) for every
arm and seed, `winner-{stage}.json` for every stage of a staged ablation, `rung-{rung}.json` for every rung of a race,
and `ablation_report.{html,md}`, `ablation.csv` and `figures/`. The target `all` does not include ablations: request
`ablation`, or one report.
"""


rule ablation:
    input:
        expand(f"{ABLATION}/ablation_report.html", ablation=study.ablations),


rule ablation_arm:
    input:
        unpack(start_inputs),
        datasets=lambda wildcards: files.datasets(
            dict.fromkeys(
                [
                    *study.ablation_datasets(wildcards.ablation),
                    *ablation_datasets(wildcards),
                ]
            )
        ),
        definitions=files.task_definitions(),
        after=winner_before,
        survivors=lambda wildcards: rung_before(wildcards, last=True),
        rungs=lambda wildcards: expand(
            RUNG,
            **wildcards,
            rung=range(
                1,
                number_of_rungs(wildcards) + 1,
            ),
        ),
    output:
        record=f"{ARM}/arm.json",
    log:
        f"{LOGS}/ablation/{{ablation}}.{{arm}}.{{seed}}.log",
    benchmark:
        f"{LOGS}/ablation/{{ablation}}.{{arm}}.{{seed}}.benchmark.tsv"
    conda:
        "../../envs/coppice.yaml"
    threads: study.threads_per_job.finetune
    resources:
        gpu=study.resources_per_job.finetune.gpu,
        gpu_model=gpu_model("finetune"),
        cpus_per_task=study.threads_per_job.finetune,
        mem_mb=asked_by_arm("mem_mb"),
        gpu_mem_mb=asked_by_arm("gpu_mem_mb"),
        disk_mb=asked_by_arm("disk_mb"),
        runtime=asked_by_arm("runtime"),
    params:
        plan=ablation_plan,
        member=lambda wildcards: arm_of(wildcards).model_dump(),
        start=start_facts,
        loading=start_loading,
        placement=start_placement,
        execution=arm_execution,
        status=lambda wildcards: status("ablation", *wildcards),
        protocol=2,
    script:
        "../scripts/train_arm.py"


use rule ablation_arm as ablation_rung with:
    input:
        unpack(start_inputs),
        datasets=lambda wildcards: files.datasets(
            study.ablation_datasets(wildcards.ablation)
        ),
        survivors=rung_before,
        rungs=lambda wildcards: [
            RUNG.format(**dict(wildcards.items()) | {"rung": rung})
            for rung in range(1, int(wildcards.rung))
        ],
    output:
        record=RUNG,
    log:
        f"{LOGS}/ablation/{{ablation}}.{{arm}}.{{seed}}.{{rung}}.log",
    benchmark:
        f"{LOGS}/ablation/{{ablation}}.{{arm}}.{{seed}}.{{rung}}.benchmark.tsv"
    params:
        plan=ablation_plan,
        member=lambda wildcards: arm_of(wildcards).model_dump(),
        start=start_facts,
        loading=start_loading,
        placement=start_placement,
        execution=arm_execution,
        share=lambda wildcards: ablation_of(wildcards).racing.rungs[
            int(wildcards.rung) - 1
        ],
        status=lambda wildcards: status("ablation", *wildcards),
        protocol=2,


rule ablation_winner:
    input:
        arms=lambda wildcards: [
            path for paths in arm_records(wildcards).values() for path in paths
        ],
        before=lambda wildcards: winner_before(wildcards, wildcards.stage),
    output:
        WINNER,
    log:
        f"{LOGS}/ablation/{{ablation}}.winner-{{stage}}.log",
    conda:
        "../../envs/coppice.yaml"
    params:
        arms=arm_records,
        choose_by=lambda wildcards: ablation_of(wildcards).choose_by.model_dump(),
        budget=lambda wildcards: ablation_of(wildcards).budget.model_dump(),
        status=lambda wildcards: status("ablation", *wildcards),
        protocol=1,
    script:
        "../scripts/choose_arm.py"


use rule ablation_winner as ablation_cut with:
    input:
        arms=lambda wildcards: [
            path for paths in rung_records(wildcards).values() for path in paths
        ],
        before=rung_before,
    output:
        SURVIVORS,
    log:
        f"{LOGS}/ablation/{{ablation}}.rung-{{rung}}.log",
    params:
        arms=rung_records,
        eta=lambda wildcards: ablation_of(wildcards).racing.eta,
        status=lambda wildcards: status("ablation", *wildcards),
        protocol=1,


rule ablation_report:
    input:
        arms=lambda wildcards: [
            path for paths in arm_records(wildcards).values() for path in paths
        ],
        winners=lambda wildcards: expand(
            WINNER,
            ablation=wildcards.ablation,
            stage=[stage.name for stage in ablation_of(wildcards).stages],
        ),
        survivors=lambda wildcards: rung_before(wildcards, last=True),
    output:
        html=report(
            f"{ABLATION}/ablation_report.html",
            category="ablation",
            caption="../report/ablation.rst",
        ),
        page=f"{ABLATION}/ablation_report.md",
        table=f"{ABLATION}/ablation.csv",
        figures=expand(
            f"{ABLATION}/figures/{{figure}}.{{kind}}",
            figure=ablation_figures.FIGURES,
            kind=["png", "svg"],
            allow_missing=True,
        ),
    log:
        f"{LOGS}/ablation/{{ablation}}.report.log",
    conda:
        "../../envs/coppice.yaml"
    params:
        arms=arm_records,
        ablation=lambda wildcards: ablation_of(wildcards).model_dump(
            include={"budget", "choose_by", "reference", "stages"}
        ),
        start=start_facts,
        status=lambda wildcards: status("ablation", *wildcards),
        protocol=1,
    script:
        "../scripts/write_ablation_report.py"
