"""Candidates: pruned by the grid, or imported from the user's table.

Input: the dense model's record, and calibration text or the user's checkpoint folder.
Output: `{results}/candidates/{model}/{candidate}/pruning.json`, beside the checkpoint, which is not declared. Models
other than miniatures also get `candidates/{model}/.grids/{check}.json` (`grid.json` if one job prunes all candidates),
the record that every point of the grid fits the model.
"""


rule candidates:
    input:
        [
            CANDIDATE.format(model=model, candidate=candidate)
            for model in study.active_models()
            for candidate in study.candidates(model)
        ],


if study.config["candidates"]["table"] is None:

    # Checks that every point of the grid fits the model, from config.json alone, before the weights are fetched
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
            # All points are checked, so that nothing is pruned if one of them does not fit. As a function of `output`
            # this is not compared with earlier runs, so an added point reruns no other check.
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
            mem_mb=requested("prune", "mem_mb"),
            gpu_mem_mb=requested("prune", "gpu_mem_mb"),
            disk_mb=requested("prune", "disk_mb"),
            runtime=requested("prune", "runtime"),
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
