"""Score candidates on the rows that selection uses."""

from pathlib import Path

from coppice import models
from coppice.core import jobs

title = " ".join(("score", *snakemake.wildcards))
with jobs.computing(
    snakemake.log[0],
    snakemake.params.status,
    title,
    snakemake.threads,
    snakemake.resources,
):
    from coppice.stages import evaluate
    from coppice.stages.prune import candidates

    loading = snakemake.params.loading | snakemake.params.placement
    records = zip(snakemake.params.candidates, snakemake.input.pruning, snakemake.output, strict=True)
    for name, pruning, scores in records:
        candidates.ensure(Path(pruning).parent)
        request = evaluate.EvaluationRequest(
            identity={"model": snakemake.wildcards.model, "candidate": name, "stage": "candidate"},
            source=models.Source(path=str(Path(pruning).parent), **loading),
            settings=evaluate.Evaluate.model_validate(snakemake.params.settings | snakemake.params.execution),
            datasets=snakemake.params.datasets,
            output=Path(scores).parent,
            purpose=snakemake.params.purpose,
            seed=snakemake.params.seed,
        )
        evaluate.evaluate(request)
