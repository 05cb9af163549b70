"""Compare the arms of an ablation and write its report."""

from pathlib import Path

from coppice.core import logs

with logs.job(
    snakemake.log[0], snakemake.threads, snakemake.params.status, f"ablation {snakemake.wildcards.ablation} report"
):
    from coppice.ablation import report
    from coppice.study.settings.resolved import ArmComparison

    report.write(
        name=snakemake.wildcards.ablation,
        ablation=ArmComparison.model_validate(snakemake.params.ablation),
        start=snakemake.params.start["name"],
        arms=snakemake.params.arms,
        winners=snakemake.input.winners,
        survivors=next(iter(snakemake.input.survivors), None),
        output=Path(snakemake.output.html).parent,
    )
