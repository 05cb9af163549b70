"""Prune a dense model at points of the grid, and write a checkpoint and its pruning.json for each."""

from pathlib import Path

from coppice import models
from coppice.core import jobs

title = " ".join(("prune", *snakemake.wildcards))
with jobs.computing(
    snakemake.log[0],
    snakemake.params.status,
    title,
    snakemake.threads,
    snakemake.resources,
    snakemake.params.loading,
):
    from coppice.stages.prune import candidates

    loading = snakemake.params.loading | snakemake.params.placement
    for (name, point), record in zip(snakemake.params.candidates.items(), snakemake.output, strict=True):
        candidates.prune(
            identity={"model": snakemake.wildcards.model, "candidate": name},
            source=models.Source.of_record(snakemake.input.model, loading),
            point=point,
            calibration=snakemake.params.calibration | {"record": snakemake.input.calibration},
            output=Path(record).parent,
            seed=snakemake.params.seed,
        )
