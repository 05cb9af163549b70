"""Fine-tune one chosen checkpoint with LoRA."""

from pathlib import Path

# Distributed training spawns processes that run this file again; the guard keeps them from starting another job.
if __name__ == "__main__":
    from coppice import models
    from coppice.core import jobs

    model, config, seeded = snakemake.wildcards
    title = f"finetune {model} {config} {seeded.strip('/')}"
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

        path, reused = candidates.checkpoint(snakemake.input.selection), snakemake.input.get("reuse")
        source = models.Source(path=path, **snakemake.params.loading, **snakemake.params.placement)
        recover.finetune(
            identity={"model": model, "config": config},
            source=source,
            datasets=snakemake.params.datasets,
            settings=snakemake.params.settings | snakemake.params.execution,
            prompt=snakemake.params.prompt,
            output=Path(snakemake.output.record).parent,
            seed=snakemake.params.seed,
            world=1 if source.device_map else max(1, jobs.gpus_of(snakemake.resources)),
            reused=Path(reused[0]).parent if reused else None,
        )
