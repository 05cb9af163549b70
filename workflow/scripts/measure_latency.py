"""Time a dense model and the candidates that the configs chose, in turns."""

from coppice import models
from coppice.core import jobs, records

params, model = snakemake.params, snakemake.wildcards.model
title = f"latency {model}"
with jobs.computing(snakemake.log[0], params.status, title, snakemake.threads, snakemake.resources):
    from coppice.stages.evaluate import Evaluate, latency
    from coppice.stages.prune import candidates
    from coppice.study import layout

    folders = {}
    for path in snakemake.input.selections:
        chosen = records.read(path)
        folders[chosen["candidate"]] = candidates.ensure(layout.chosen_folder(path, chosen))
    request = latency.LatencyRequest(
        source=models.Source.of_record(snakemake.input.dense, params.loading | params.placement),
        candidates=folders,
        settings=Evaluate.model_validate({"cost": params.cost}).cost,
    )
    latency.measure({"model": model}, request, snakemake.output[0])
