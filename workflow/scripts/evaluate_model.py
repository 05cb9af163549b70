"""Evaluate a dense, pruned or finetuned model on the rows that reports use."""

from pathlib import Path

from coppice import jobs, models

stage = snakemake.params.stage
model, config = snakemake.wildcards.model, snakemake.wildcards.get("config")
seeded = snakemake.wildcards.get("seeded", "").strip("/")
title = " ".join(filter(None, ("evaluate", stage, model, config, seeded)))
with jobs.computing(
    snakemake.log[0],
    snakemake.params.status,
    title,
    snakemake.threads,
    snakemake.resources,
    snakemake.params.loading,
):
    from coppice import candidates, evaluation

    params, twin = snakemake.params, snakemake.input.get("twin")
    loading = params.loading | params.placement
    if stage == "dense":
        source = models.Source.of_record(snakemake.input.model, loading)
    else:
        source = models.Source(path=candidates.checkpoint(snakemake.input.selection), **loading)
    evaluation.evaluate(
        identity={"model": model, "config": config, "stage": stage},
        source=source,
        settings=params.settings | params.handling,
        datasets=params.datasets,
        output=Path(snakemake.output.evaluation).parent,
        dense=snakemake.input.get("dense"),
        selection=snakemake.input.get("selection"),
        adapter=Path(snakemake.input.adapter).parent if stage == "finetuned" else None,
        seed=params.seed,
        twin=Path(twin[0]).parent if twin else None,
        prompt=params.prompt,
    )
