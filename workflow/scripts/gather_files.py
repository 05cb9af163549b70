"""Name the files that many jobs rest on, with their digests, in one file for all of these jobs."""

from coppice import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice import large_studies

    large_studies.gather(snakemake.input, snakemake.output[0])
