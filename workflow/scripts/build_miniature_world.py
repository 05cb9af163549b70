"""Generate the miniature study's world: corpora, instructions and task items."""

from coppice import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.miniature import prepare

    prepare.prepare_world(snakemake.params.folder, snakemake.params.seed)
