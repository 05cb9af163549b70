"""Fine-tune one chosen candidate with LoRA."""

from pathlib import Path

# Distributed training spawns processes that run this file again; the guard keeps them from starting another job.
if __name__ == "__main__":
    from coppice import models
    from coppice.core import jobs

    model, candidate, seeded = snakemake.wildcards
    title = f"finetune {model} {candidate} {seeded.strip('/')}"
    with jobs.computing(
        snakemake.log[0],
        snakemake.params.status,
        title,
        snakemake.threads,
        snakemake.resources,
    ):
        jobs.stop_in_time(snakemake.resources)  # called before torch is imported, which may take minutes
        from coppice.stages import recover
        from coppice.stages.prune import candidates
        from coppice.study import earlier_layout

        record, output = snakemake.input.candidate, Path(snakemake.output.record).parent
        earlier_layout.adopt("training", record, output)
        path = candidates.ensure(Path(record).parent)
        placement = snakemake.params.placement
        source = models.Source(path=path, **snakemake.params.loading, **placement)
        settings = dict(snakemake.params.settings)
        loading = settings.pop("teacher_loading", None)
        teacher = models.Source.of_record(snakemake.input.teacher, loading | placement) if loading else None
        request = recover.TrainingRequest(
            identity={"model": model, "candidate": candidate},
            source=source,
            datasets=snakemake.params.datasets,
            settings=recover.TrainingSettings.model_validate(settings | snakemake.params.execution),
            prompt=snakemake.params.prompt,
            output=output,
            seed=snakemake.params.seed,
            teacher=teacher,
            world=1 if source.device_map else max(1, jobs.gpus_of(snakemake.resources)),
        )
        recover.finetune(request)
