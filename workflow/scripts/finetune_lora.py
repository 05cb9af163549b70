"""Fine-tune one chosen candidate with LoRA."""

from pathlib import Path

# Distributed training spawns processes that run this file again; the guard keeps them from starting another job.
if __name__ == "__main__":
    from coppice import models
    from coppice.core import jobs

    model, candidate, seeded = snakemake.wildcards
    title = f"finetune {model} {candidate} {seeded.strip('/')}"
    params = snakemake.params
    with jobs.computing(snakemake.log[0], params.status, title, snakemake.threads, snakemake.resources):
        jobs.stop_in_time(snakemake.resources)  # called before torch is imported, which may take minutes
        from coppice.stages import recover
        from coppice.stages.prune import candidates
        from coppice.study import earlier_layout

        record, output = snakemake.input.candidate, Path(snakemake.output.record).parent
        earlier_layout.adopt("training", record, output)
        path = candidates.ensure(Path(record).parent)
        source = models.Source(path=path, **params.loading, **params.placement)
        settings = dict(params.settings)
        taught = settings.pop("teacher_loading", None)
        teacher = models.Source.of_record(snakemake.input.teacher, taught | params.placement) if taught else None
        request = recover.TrainingRequest(
            identity={"model": model, "candidate": candidate},
            source=source,
            datasets=params.datasets,
            settings=recover.TrainingSettings.model_validate(settings | params.execution),
            prompt=params.prompt,
            output=output,
            seed=params.seed,
            teacher=teacher,
            world=1 if source.device_map else max(1, jobs.gpus_of(snakemake.resources)),
        )
        recover.finetune(request)
