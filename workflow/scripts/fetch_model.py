"""Fetch a model from the hub, or register a local folder, and write its model.json."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads, fetches=True):
    from coppice import models
    from coppice.data import fetching
    from coppice.models import intake
    from coppice.stages import recover

    fetching.fetch_model(
        snakemake.wildcards.model,
        snakemake.params.source,
        snakemake.params.revision,
        snakemake.output[0],
        snakemake.params.prompt,
        intake.Needs(**snakemake.params.needs),
    )
    source = models.Source(models.folder_of(snakemake.output[0]), **snakemake.params.loading)
    recover.check_layers(snakemake.wildcards.model, source, snakemake.params.training)
