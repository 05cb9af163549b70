"""Train one arm of an ablation with one seed, up to a rung of a race or to the end, and evaluate it."""

from pathlib import Path

# Distributed training spawns processes that run this file again; the guard keeps them from starting another job.
if __name__ == "__main__":
    from coppice import models
    from coppice.core import jobs

    name, arm, seed = snakemake.wildcards[:3]
    params, inputs = snakemake.params, snakemake.input
    title = " ".join(["ablation", *snakemake.wildcards])
    with jobs.computing(snakemake.log[0], params.status, title, snakemake.threads, snakemake.resources):
        jobs.stop_in_time(snakemake.resources)  # called before torch is imported, which may take minutes
        from coppice.ablation import arm as arms
        from coppice.stages.prune import candidates

        chosen, dense = inputs.get("selection"), inputs.get("dense")
        path = candidates.checkpoint(chosen) if chosen else params.start["path"]
        loading = params.loading | params.placement
        source = models.Source(path, **loading) if path else models.Source.of_record(dense, loading)
        taught = params.start.get("teacher")
        teacher = models.Source.of_record(inputs.teacher, taught | params.placement) if taught else None
        candidate = candidates.record_of(chosen)
        request = arms.ArmRequest(
            identity={"ablation": name, "arm": arm},
            start=arms.Start(params.start["name"], source, params.start["prompt"], dense, candidate, teacher),
            plan=arms.ArmPlan.of(params.plan, params.execution),
            member=arms.StudyArm.model_validate(params.member),
            seed=int(seed),
            output=Path(snakemake.output.record),
            share=params.get("share"),
            after=next(iter(inputs.get("after") or []), None),
            survivors=next(iter(inputs.get("survivors") or []), None),
            world=1 if source.device_map else max(1, jobs.gpus_of(snakemake.resources)),
        )
        arms.train(request)
