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
):
    from coppice.stages import prune
    from coppice.stages.prune import candidates

    source = models.Source.of_record(snakemake.input.model, snakemake.params.loading | snakemake.params.placement)
    prune.check_grid(snakemake.wildcards.model, Path(source.path) / "config.json", snakemake.params.whole_grid)
    for (name, point), record in zip(snakemake.params.candidates.items(), snakemake.output, strict=True):
        request = candidates.PruningRequest(
            source=source,
            point=point,
            calibration=snakemake.params.calibration | {"record": snakemake.input.calibration},
            output=Path(record).parent,
            seed=snakemake.params.seed,
        )
        candidates.prune({"model": snakemake.wildcards.model, "candidate": name}, request)
