"""Write one file that lists inputs shared by many jobs, with their digests."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.planning import gathered_inputs

    gathered_inputs.gather(snakemake.input, snakemake.output[0])
