"""Candidates: pruned here by the grid, or taken in from the user's table.

Takes the dense model's record and calibration text (or the user's folder); gives `{results}/candidates/{model}/
{candidate}/pruning.json`, beside which the checkpoint lies, and `candidates/grids.json` once the grid is known to fit.
"""


rule candidates:
    input:
        [
            CANDIDATE.format(model=model, candidate=candidate)
            for model in study.active_models()
            for candidate in study.candidates(model)
        ],


if study.config["candidates"]["table"] is None:

    localrules:
        check_grids,

    rule check_grids:
        """Whether every model takes every point of its grid, found before the first of them is pruned."""
        input:
            list(config_files().values()),
        output:
            GRIDS,
        log:
            f"{LOGS}/prune/check_grids.log",
        conda:
            "../../envs/coppice.yaml"
        params:
            configs=config_files(),
            grids={model: study.candidates(model) for model in config_files()},
            protocol=1,
        script:
            "../scripts/check_grids.py"

    rule prune_candidate:
        input:
            model=lambda wildcards: model_record(wildcards.model),
            calibration=dataset_record(study.calibration["dataset"]),
            # a point that is added makes no other candidate anew
            grids=ancient(GRIDS) if config_files() else [],
        output:
            produced(CANDIDATE),
        log:
            f"{LOGS}/prune/{CANDIDATE_JOB}.log",
        benchmark:
            f"{LOGS}/prune/{CANDIDATE_JOB}.benchmark.tsv"
        conda:
            "../../envs/coppice.yaml"
        threads: study.threads_per_job["prune"]
        resources:
            gpu=gpus("prune"),
            cpus_per_task=study.threads_per_job["prune"],
            mem_mb=memory("prune"),
            runtime=runtime("prune"),
        params:
            candidates=job_candidates,
            calibration=study.calibration,
            loading=lambda wildcards: loading(wildcards.model),
            seed=study.seed,
            status=lambda wildcards: status("prune", *wildcards),
            protocol=1,
        script:
            "../scripts/prune_candidate.py"

else:

    rule import_candidate:
        input:
            lambda wildcards: f"{study.candidates(wildcards.model)[wildcards.candidate]['path']}/config.json",
        output:
            CANDIDATE,
        log:
            f"{LOGS}/prune/{{model}}.{{candidate}}.log",
        conda:
            "../../envs/coppice.yaml"
        params:
            row=lambda wildcards: study.candidates(wildcards.model)[wildcards.candidate],
            status=lambda wildcards: status(
                "prune", wildcards.model, wildcards.candidate
            ),
            protocol=1,
        script:
            "../scripts/import_candidate.py"
