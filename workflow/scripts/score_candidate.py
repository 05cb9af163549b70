"""Score one candidate on the rows that selection uses."""

from pathlib import Path

from coppice import logs, models

model, candidate = snakemake.wildcards.model, snakemake.wildcards.candidate
with logs.job(snakemake.log[0], snakemake.threads, snakemake.params.status, f"score {model} {candidate}"):
    from coppice import evaluation

    evaluation.evaluate(
        identity={"model": model, "candidate": candidate, "stage": "candidate"},
        source=models.Source(path=str(Path(snakemake.input.pruning).parent), **snakemake.params.loading),
        settings=snakemake.params.settings,
        datasets=snakemake.params.datasets,
        output=Path(snakemake.output.evaluation).parent,
        purpose=snakemake.params.purpose,
        seed=snakemake.params.seed,
    )
