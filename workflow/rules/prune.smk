"""Candidates: pruned here by the grid, or taken in from the user's table.

Takes the dense model's record and calibration text (or, with that record, the user's folder); gives
`{results}/candidates/{model}/{candidate}/pruning.json`, beside which the checkpoint lies, and
`candidates/{model}/.grids/{check}.json` (`grid.json` where one job makes all) once a model that is not made here is known
to take every point of its grid.
"""


rule candidates:
    input:
        [
            CANDIDATE.format(model=model, candidate=candidate)
            for model in study.active_models()
            for candidate in study.candidates(model)
        ],


if study.config["candidates"]["table"] is None:

    # whether a model takes every point of its grid, found before its weights are here
    rule check_grid:
        input:
            lambda wildcards: files.configurations.get(wildcards.model, []),
        output:
            GRID,
        log:
            f"{LOGS}/prune/check_grid.{GRID_JOB}.log",
        wildcard_constraints:
            check="[0-9a-f]{12}",
        priority: 100
        localrule: True
        conda:
            "../../envs/coppice.yaml"
        params:
            grid=job_candidates if SHARED else None,
            # every point, so that none is pruned where one does not fit; asked of `output`, it is not compared: a point
            # that is added makes no other one anew
            every=lambda wildcards, output: study.candidates(wildcards.model),
            protocol=1,
        script:
            "../scripts/check_grid.py"

    rule prune_candidate:
        input:
            model=of_model(files.model),
            calibration=files.dataset(study.calibration["dataset"]),
            grid=checked_grid,
        output:
            produced(CANDIDATE),
        log:
            f"{LOGS}/prune/{CANDIDATE_JOB}.log",
        benchmark:
            f"{LOGS}/prune/{CANDIDATE_JOB}.benchmark.tsv"
        priority: PRIORITY["prune"]
        conda:
            "../../envs/coppice.yaml"
        threads: study.threads_per_job["prune"]
        resources:
            gpu=gpu_count("prune"),
            gpu_model=gpu_model("prune"),
            cpus_per_task=study.threads_per_job["prune"],
            mem_mb=asked("prune", "mem_mb"),
            gpu_mem_mb=asked("prune", "gpu_mem_mb"),
            disk_mb=asked("prune", "disk_mb"),
            runtime=asked("prune", "runtime"),
        params:
            candidates=job_candidates,
            calibration=study.calibration,
            loading=of_model(loading),
            placement=placement,
            seed=study.seed,
            status=status("prune", CANDIDATE_JOB),
            protocol=1,
        script:
            "../scripts/prune_candidate.py"

else:

    rule import_candidate:
        input:
            lambda wildcards: layout.candidate_files(
                study.candidates(wildcards.model)[wildcards.candidate]["path"]
            ),
            model=of_model(files.model),
        output:
            CANDIDATE,
        log:
            f"{LOGS}/prune/{{model}}.{{candidate}}.log",
        conda:
            "../../envs/coppice.yaml"
        params:
            row=lambda wildcards: study.candidates(wildcards.model)[wildcards.candidate],
            status=status("prune", CANDIDATE_JOB),
            protocol=1,
        script:
            "../scripts/import_candidate.py"
