"""Fetch a model's config.json, before its weights, and check the pruning grid against it."""

from pathlib import Path

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads, fetches=True):
    from coppice.data import fetching
    from coppice.models import intake
    from coppice.stages import prune

    fetching.fetch_config(
        name=snakemake.wildcards.model,
        source=snakemake.params.source,
        revision=snakemake.params.revision,
        output=snakemake.output[0],
    )
    intake.check_kind(Path(snakemake.output[0]).parent, snakemake.params.kind, snakemake.wildcards.model)
    prune.check_grid(snakemake.wildcards.model, snakemake.output[0], snakemake.params.whole_grid)
