"""Check that a model takes every point of its pruning grid."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.stages import prune

    prune.check_grid(
        model=snakemake.wildcards.model,
        config=snakemake.input[0],
        grid=snakemake.params.every,
        output=snakemake.output[0],
    )
