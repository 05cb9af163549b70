"""Check that every model takes every point of its pruning grid."""

from coppice import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice import pruning

    pruning.check_grids(
        configs=snakemake.params.configs,
        grids=snakemake.params.grids,
        output=snakemake.output[0],
    )
