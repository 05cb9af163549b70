"""Ablations of the fine-tuning: arms that train one checkpoint at an equal budget, compared on data held back.

Takes the start of each ablation (a selection, a dense model or a checkpoint folder) and the data; gives
`ablation/{ablation}/{arm}/seed-{seed}/` (a training with its evaluations, summed up in `arm.json`) for every arm and
seed, `winner-{stage}.json` for every stage of a staged ablation, `rung-{rung}.json` for every rung of a race, and
`ablation_report.{html,md}`, `ablation.csv` and `figures/`. No part of `all`: ask for `ablation`, or for one report.
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
                    *study.training_datasets(ablated(wildcards)["finetune"]),
                    *ablation_datasets(wildcards),
                ]
            )
        ),
        definitions=files.task_definitions(),
        after=winner_before,
        survivors=lambda wildcards: rung_before(wildcards, last=True),
        reached=lambda wildcards: expand(
            REACHED,
            **wildcards,
            rung=range(
                1, len((ablated(wildcards)["racing"] or {"rungs": []})["rungs"]) + 1
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
    threads: study.threads_per_job["finetune"]
    resources:
        gpu=gpu_count("finetune"),
        gpu_model=gpu_model("finetune"),
        cpus_per_task=study.threads_per_job["finetune"],
        mem_mb=asked_by_arm("mem_mb"),
        gpu_mem_mb=asked_by_arm("gpu_mem_mb"),
        disk_mb=asked_by_arm("disk_mb"),
        runtime=asked_by_arm("runtime"),
    params:
        plan=ablation_plan,
        member=lambda wildcards: ablated(wildcards)["arms"][wildcards.arm],
        start=start_facts,
        loading=start_loading,
        placement=start_placement,
        execution=arm_handling,
        status=lambda wildcards: status("ablation", *wildcards),
        protocol=1,
    script:
        "../scripts/train_arm.py"


use rule ablation_arm as ablation_rung with:
    input:
        unpack(start_inputs),
        datasets=lambda wildcards: files.datasets(
            study.training_datasets(ablated(wildcards)["finetune"])
        ),
        survivors=rung_before,
        reached=lambda wildcards: [
            REACHED.format(**dict(wildcards.items()) | {"rung": rung})
            for rung in range(1, int(wildcards.rung))
        ],
    output:
        record=REACHED,
    log:
        f"{LOGS}/ablation/{{ablation}}.{{arm}}.{{seed}}.{{rung}}.log",
    benchmark:
        f"{LOGS}/ablation/{{ablation}}.{{arm}}.{{seed}}.{{rung}}.benchmark.tsv"
    params:
        plan=ablation_plan,
        member=lambda wildcards: ablated(wildcards)["arms"][wildcards.arm],
        start=start_facts,
        loading=start_loading,
        placement=start_placement,
        execution=arm_handling,
        share=lambda wildcards: ablated(wildcards)["racing"]["rungs"][
            int(wildcards.rung) - 1
        ],
        status=lambda wildcards: status("ablation", *wildcards),
        protocol=1,


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
        choose_by=lambda wildcards: ablated(wildcards)["choose_by"],
        budget=lambda wildcards: ablated(wildcards)["budget"],
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
        CUT,
    log:
        f"{LOGS}/ablation/{{ablation}}.rung-{{rung}}.log",
    params:
        arms=rung_records,
        eta=lambda wildcards: ablated(wildcards)["racing"]["eta"],
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
            stage=[stage["name"] for stage in ablated(wildcards)["stages"]],
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
        ablation=lambda wildcards: {
            key: ablated(wildcards)[key]
            for key in ("budget", "choose_by", "reference", "stages")
        },
        start=start_facts,
        status=lambda wildcards: status("ablation", *wildcards),
        protocol=1,
    script:
        "../scripts/write_ablation_report.py"
