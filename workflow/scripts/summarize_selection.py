"""Write the table of all candidates and the summary of the choices."""

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice.stages import select

    select.summarize(
        folders_by_model=snakemake.params.folders,
        selections=snakemake.input.selections,
        table=snakemake.output.table,
        page=snakemake.output.page,
    )
