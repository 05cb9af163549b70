"""Generate the miniature study's data: corpora, instructions and task items."""

from pathlib import Path

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.miniature import prepare

    prepare.prepare_world(Path(snakemake.output[0]).parent.parent, snakemake.params.seed)
