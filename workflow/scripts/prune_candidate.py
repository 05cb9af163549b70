"""Prune a dense model at one point of the grid: a checkpoint and its pruning.json."""

from pathlib import Path

from coppice import logs, models

model, candidate = snakemake.wildcards.model, snakemake.wildcards.candidate
with logs.job(snakemake.log[0], snakemake.threads, snakemake.params.status, f"prune {model} {candidate}"):
    from coppice import candidates

    candidates.prune(
        identity={"model": model, "candidate": candidate},
        source=models.Source.of_record(snakemake.input.model, snakemake.params.loading),
        point=snakemake.params.point,
        calibration=snakemake.params.calibration | {"record": snakemake.input.calibration},
        output=Path(snakemake.output[0]).parent,
        seed=snakemake.params.seed,
    )
