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

    twin = snakemake.input.get("twin")
    if stage == "dense":
        source = models.Source.of_record(snakemake.input.model, snakemake.params.loading)
    else:
        source = models.Source(path=candidates.checkpoint(snakemake.input.selection), **snakemake.params.loading)
    evaluation.evaluate(
        identity={"model": model, "config": config, "stage": stage},
        source=source,
        settings=snakemake.params.settings,
        datasets=snakemake.params.datasets,
        output=Path(snakemake.output.evaluation).parent,
        dense=snakemake.input.get("dense"),
        selection=snakemake.input.get("selection"),
        adapter=Path(snakemake.input.adapter).parent if stage == "finetuned" else None,
        seed=snakemake.params.seed,
        twin=Path(twin[0]).parent if twin else None,
        prompt=snakemake.params.prompt,
    )
