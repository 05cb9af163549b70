"""Check that every point of a pruning grid fits the model."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.stages import prune

    prune.check_grid(
        model=snakemake.wildcards.model,
        config=snakemake.input[0],
        grid=snakemake.params.every,
        output=snakemake.output[0],
    )
