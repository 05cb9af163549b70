"""Generate a source tree and build the miniature study's code data from it."""

from pathlib import Path

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.miniature import prepare

    prepare.prepare_code(Path(snakemake.output[0]).parent.parent, snakemake.params.seed)
