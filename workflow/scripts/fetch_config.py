"""Fetch a model's config.json from the hub, before its weights."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads, fetches=True):
    from coppice.data import fetching

    fetching.fetch_config(
        name=snakemake.wildcards.model,
        source=snakemake.params.source,
        revision=snakemake.params.revision,
        output=snakemake.output[0],
    )
