"""Fetch a data set from the hub, or read a local one, and write dataset.json and one parquet file for each role."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads, fetches=True):
    from coppice.data import fetching

    fetching.fetch_dataset(
        snakemake.wildcards.dataset,
        snakemake.params.entry,
        snakemake.params.needs_selection,
        snakemake.output[0],
        snakemake.params.include_path,
        snakemake.params.own_task,
    )
