"""Compare a model and config before and after fine-tuning."""

from pathlib import Path

from coppice.core import logs

model, config = snakemake.wildcards.model, snakemake.wildcards.config
with logs.job(snakemake.log[0], snakemake.threads, snakemake.params.status, f"compare {model} {config}"):
    from coppice.stages.compare import comparison

    finetuned = Path(snakemake.input.finetuned).parent
    more = [Path(path).parent for path in snakemake.input.seeds]
    comparison.compare(
        identity={"model": model, "config": config},
        evaluations={stage: Path(snakemake.input[stage]).parent for stage in ("dense", "pruned", "finetuned")},
        selection=snakemake.input.selection,
        finetuning=snakemake.input.finetuning,
        output={"record": snakemake.output.record, "report": snakemake.output.report},
        seed=snakemake.params.seed,
        seeds=dict(zip(snakemake.params.seeds, [finetuned, *more], strict=True)) if more else None,
    )
