"""Link a candidate's training or evaluation into the folder of a config that chose the candidate."""

from pathlib import Path

from coppice.core import logs

model, config, *seeded = snakemake.wildcards
title = " ".join(["link", model, config, *(name.strip("/") for name in seeded)])
with logs.job(snakemake.log[0], snakemake.threads, snakemake.params.status, title):
    from coppice.stages import select

    select.link(
        identity={"model": model, "config": config},
        record=snakemake.input.record,
        folder=Path(snakemake.output[0]).parent,
        before=snakemake.input.selections,
    )
