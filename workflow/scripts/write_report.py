"""Render the study's report from its records."""

from pathlib import Path

from coppice.core import logs

with logs.job(snakemake.log[0], snakemake.threads, snakemake.params.status, "report"):
    from coppice.report import study_report

    study_report.write_report(
        results=Path(snakemake.output.html).parent.parent,
        pairs=snakemake.params.pairs,
        models=snakemake.params.models,
        output=Path(snakemake.output.html).parent,
        metadata={"seed": snakemake.params.seed},
    )
