"""Candidates: pruned by the grid, or imported from the user's table.

Input: the dense model's record, and calibration text or the user's checkpoint folder.
Output: `{results}/candidates/{model}/{candidate}/pruning.json`, beside the checkpoint, which is not declared.

A change of the report or selection rows of the calibration data prunes nothing again: candidates depend on its train rows.

That every point of the grid fits the model is checked by `fetch_config`, before the weights are here, and again by each
job that prunes, because points may be added later.
"""


rule candidates:
    input:
        [
            CANDIDATE.format(model=model, candidate=candidate)
            for model in study.active_models()
            for candidate in study.candidates(model)
        ],


if PRUNES:

    @inspected_once
    def calibration_rows(wildcards):
        """Return the record of the calibration data, as an ancient input if its rows made these candidates."""
        calibration = study.calibration_of(wildcards.model)
        record = files.dataset(calibration.dataset)
        points = {
            CANDIDATE.format(model=wildcards.model, candidate=name): point
            for name, point in job_candidates(wildcards).items()
        }
        recipe = {
            "source": loading(wildcards.model),
            "calibration": calibration.model_dump() | {"record": record},
            "seed": study.seed,
        }
        rows = calibration_fingerprint(calibration.dataset)
        kept = calibrated.made_from(points, recipe, rows)
        return ancient(record) if kept else record

    @functools.cache
    def calibration_fingerprint(name):
        """Return the fingerprint of the train rows of a data set, or None if this run may change them."""
        entry = study.dataset(name)
        return entry and calibrated.train_rows(files.dataset(name), entry)

    rule prune_candidate:
        input:
            model=of_model(files.model),
            calibration=calibration_rows,
            configuration=of_model(files.checked_configuration),
        output:
            produced(CANDIDATE),
        log:
            f"{LOGS}/prune/{CANDIDATE_JOB}.log",
        benchmark:
            f"{LOGS}/prune/{CANDIDATE_JOB}.benchmark.tsv"
        priority: PRIORITY["prune"]
        conda:
            "../../envs/coppice.yaml"
        threads: study.threads_per_job.prune
        resources:
            gpu=study.resources_per_job.prune.gpu,
            gpu_model=gpu_model("prune"),
            cpus_per_task=study.threads_per_job.prune,
            mem_mb=requested("prune", "mem_mb"),
            gpu_mem_mb=requested("prune", "gpu_mem_mb"),
            disk_mb=requested("prune", "disk_mb"),
            runtime=requested("prune", "runtime"),
        params:
            candidates=job_candidates,
            whole_grid=whole_grid,
            calibration=of_model(lambda model: study.calibration_of(model).model_dump()),
            loading=of_model(loading),
            placement=placement,
            seed=study.seed,
            status=status("prune", CANDIDATE_JOB),
            protocol=2,
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
            # These are only checked and do not change what is imported.
            needs=untracked(lambda wildcards: needs(wildcards.model)),
            loading=untracked(lambda wildcards: loading(wildcards.model)),
            training=untracked(
                lambda wildcards: study.finetune_of(wildcards.model).model_dump()
            ),
            status=status("prune", CANDIDATE_JOB),
            protocol=1,
        script:
            "../scripts/import_candidate.py"
