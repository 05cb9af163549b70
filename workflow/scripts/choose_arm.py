"""Choose among the arms of an ablation: the winner of a stage, or the arms that continue after a rung of a race."""

from coppice.core import logs

with logs.job(
    snakemake.log[0], snakemake.threads, snakemake.params.status, " ".join(["ablation", *snakemake.wildcards])
):
    from coppice.ablation import races, stages
    from coppice.study.settings.resolved import Budget
    from coppice.study.settings.sections.ablation import ChooseBy

    params, before = snakemake.params, next(iter(snakemake.input.before), None)
    if params.get("eta"):
        races.cut(snakemake.wildcards.ablation, params.arms, params.eta, snakemake.output[0], before)
    else:
        stages.decide(
            ablation=snakemake.wildcards.ablation,
            stage=snakemake.wildcards.stage,
            arms=params.arms,
            choose_by=ChooseBy.model_validate(params.choose_by),
            budget=Budget.model_validate(params.budget),
            output=snakemake.output[0],
            before=before,
        )
