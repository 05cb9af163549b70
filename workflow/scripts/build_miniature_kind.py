"""Train one tiny model of the picture world or of the code world."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.miniature import prepare

    prepare.prepare_kind(
        name=snakemake.wildcards.miniature,
        rows=list(snakemake.input),
        record=snakemake.output[0],
        seed=snakemake.params.seed,
        steps=snakemake.params.steps,
    )
