"""Write the table of all candidates and the summary of what was chosen."""

from coppice import logs

with logs.job(snakemake.log[0], snakemake.threads):
    from coppice import selection

    selection.summarize(
        folders_by_model=snakemake.params.folders,
        selections=snakemake.input.selections,
        table=snakemake.output.table,
        page=snakemake.output.page,
    )
