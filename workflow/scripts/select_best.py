"""Choose the best candidate of a model by one criterion."""

from pathlib import Path

from coppice.core import logs

model, config = snakemake.wildcards.model, snakemake.wildcards.config
with logs.job(snakemake.log[0], snakemake.threads, snakemake.params.status, f"select {model} {config}"):
    from coppice.stages import select

    select.select_best(
        identity={"model": model, "config": config},
        criterion=snakemake.params.criterion,
        folders=snakemake.params.folders,
        output=Path(snakemake.output[0]).parent,
        seed=snakemake.params.seed,
    )
