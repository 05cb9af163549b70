"""Delete the weights of candidates that no config chose."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.stages.prune import candidates

    candidates.release(
        model=snakemake.wildcards.model,
        folders=snakemake.params.folders,
        selections=snakemake.input.selections,
        output=snakemake.output[0],
    )
