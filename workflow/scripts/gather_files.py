"""Name the files that many jobs rest on, with their digests, in one file for all of these jobs."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.planning import gathered_inputs

    gathered_inputs.gather(snakemake.input, snakemake.output[0])
