"""Import one of the user's pruned checkpoints: link it and write its pruning.json."""

from pathlib import Path

from coppice.core import logs

model, candidate = snakemake.wildcards.model, snakemake.wildcards.candidate
with logs.job(snakemake.log[0], snakemake.threads, snakemake.params.status, f"import {model} {candidate}"):
    from coppice import models
    from coppice.models import intake
    from coppice.stages import recover
    from coppice.stages.prune import candidates

    path = Path(snakemake.params.row["path"]).expanduser().absolute()
    candidates.import_checkpoint(
        identity={"model": model, "candidate": candidate},
        path=path,
        given=snakemake.params.row["given"],
        dense=snakemake.input.model,
        output=Path(snakemake.output[0]).parent,
        needs=intake.Needs(**snakemake.params.needs),
    )
    # It may be of another architecture than the dense model
    recover.check_layers(model, models.Source(str(path), **snakemake.params.loading), snakemake.params.training)
