"""Evaluate a dense, pruned or fine-tuned model on the rows that reports use."""

from pathlib import Path

from coppice import models
from coppice.core import jobs

stage = snakemake.params.stage
model, config = snakemake.wildcards.model, snakemake.wildcards.get("config")
with jobs.computing(
    snakemake.log[0],
    snakemake.params.status,
    " ".join(filter(None, ("evaluate", stage, *(name.strip("/") for name in snakemake.wildcards)))),
    snakemake.threads,
    snakemake.resources,
):
    from coppice.stages import evaluate
    from coppice.stages.prune import candidates

    params, reused = snakemake.params, snakemake.input.get("reuse")
    if stage == "dense":
        source = models.Source.of_record(snakemake.input.model, params.loading | params.placement)
    else:
        path = candidates.checkpoint(snakemake.input.selection)
        source = models.Source(path=path, **params.loading, **params.placement)
    evaluate.evaluate(
        identity={"model": model, "config": config, "stage": stage},
        source=source,
        settings=params.settings | params.execution,
        datasets=params.datasets,
        output=Path(snakemake.output.evaluation).parent,
        dense=snakemake.input.get("dense"),
        selection=snakemake.input.get("selection"),
        adapter=Path(snakemake.input.adapter).parent if stage == "finetuned" else None,
        seed=params.seed,
        reused=Path(reused[0]).parent if reused else None,
        prompt=params.prompt,
    )
