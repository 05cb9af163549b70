"""Train one tiny base model of the miniature study, or tune its instruct version from it."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.miniature import prepare

    prepare.prepare_model(
        name=snakemake.wildcards.miniature,
        corpus=list(snakemake.input.corpus),
        parents=list(snakemake.input.parents),
        record=snakemake.output[0],
        seed=snakemake.params.seed,
        steps=snakemake.params.steps,
        context=snakemake.params.context,
    )
