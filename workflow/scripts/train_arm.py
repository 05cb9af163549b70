"""Train one arm of an ablation with one seed, to a rung of a race or to the end, and measure it."""

from pathlib import Path

# Processes that train together are spawned, and spawning runs this file once more: hence the guard.
if __name__ == "__main__":
    from coppice import models
    from coppice.core import jobs

    name, arm, seed = snakemake.wildcards[:3]
    params, own = snakemake.params, snakemake.input
    with jobs.computing(
        snakemake.log[0],
        params.status,
        " ".join(["ablation", *snakemake.wildcards]),
        snakemake.threads,
        snakemake.resources,
        params.loading,
    ):
        jobs.stop_in_time(snakemake.resources)  # before torch, whose import may take minutes
        from coppice.ablation import arm as arms
        from coppice.stages.prune import candidates

        chosen, dense = own.get("selection"), own.get("dense")
        path, how = candidates.checkpoint(chosen) if chosen else params.start["path"], params.loading | params.placement
        source = models.Source(path, **how) if path else models.Source.of_record(dense, how)
        arms.train(
            identity={"ablation": name, "arm": arm},
            start=arms.Start(params.start["name"], source, params.start["prompt"], chosen and dense, chosen),
            plan=params.plan | {part: params.plan[part] | how for part, how in params.execution.items()},
            member=params.member,
            seed=int(seed),
            output=Path(snakemake.output.record),
            share=params.get("share"),
            after=next(iter(own.get("after") or []), None),
            survivors=next(iter(own.get("survivors") or []), None),
            world=1 if source.device_map else max(1, jobs.gpus_of(snakemake.resources)),
        )
