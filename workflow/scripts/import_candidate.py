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
    # Of another architecture than the dense model, it may lack the layers that finetune.lora.target_modules names
    settings = recover.TrainingSettings.model_validate(snakemake.params.training)
    with intake.told_of(model):
        recover.trainable_parameters(models.Source(str(path), **snakemake.params.loading), settings)
