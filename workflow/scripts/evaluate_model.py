"""Evaluate a dense, pruned or fine-tuned model on the rows that reports use."""

from pathlib import Path

from coppice import models
from coppice.core import jobs

params, candidate = snakemake.params, snakemake.input.get("candidate")
stage, about = params.stage, "candidate" if candidate else "config"
title = " ".join(filter(None, ("evaluate", stage, *(name.strip("/") for name in snakemake.wildcards))))
with jobs.computing(snakemake.log[0], params.status, title, snakemake.threads, snakemake.resources):
    from coppice.stages import evaluate
    from coppice.stages.prune import candidates
    from coppice.study import earlier_layout

    output = Path(snakemake.output.evaluation).parent
    if candidate:
        earlier_layout.adopt(stage, candidate, output)
        source = models.Source(candidates.ensure(Path(candidate).parent), **params.loading, **params.placement)
    else:
        source = models.Source.of_record(snakemake.input.model, params.loading | params.placement)
    request = evaluate.EvaluationRequest(
        identity={"model": snakemake.wildcards.model, about: snakemake.wildcards.get("candidate"), "stage": stage},
        source=source,
        settings=evaluate.Evaluate.model_validate(params.settings | params.execution),
        datasets=params.datasets,
        output=output,
        dense=snakemake.input.get("dense"),
        candidate=candidate,
        adapter=Path(snakemake.input.adapter).parent if stage == "finetuned" else None,
        seed=params.seed,
        prompt=params.prompt,
    )
    evaluate.evaluate(request)
