"""Draw the miniature study's pictures, and write their captions, questions, pairs and classes."""

from pathlib import Path

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.miniature import prepare

    prepare.prepare_pictures(Path(snakemake.output[0]).parent.parent, snakemake.params.seed)
