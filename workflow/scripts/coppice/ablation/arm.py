"""Train and evaluate one arm of an ablation with one seed, and write its record `arm.json`.

The arm's folder holds the files of any fine-tuning, `validation_losses.json`, and, if the arm is evaluated, the records
of an evaluation in `selection/` and `report/`. A rerun repeats nothing that is finished: the training continues from
its newest checkpoint, and an evaluation keeps its finished parts.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from coppice import models
from coppice.core import mirror, records
from coppice.render import formatting
from coppice.stages import evaluate, recover
from coppice.stats.metrics import LOSS
from coppice.study.settings import arms

logger = logging.getLogger("coppice.ablation")

PARTS = ("selection", "report")
# In an arm's folder: the records that name the arm, and what is not shown if another arm has the same training
NAMED = (recover.EXAMPLE_LOSSES_FILE, "training_state.json", "finetuning_config.json")
OWN = ("arm.json", recover.RUNG_LOSS_FILE, "rung-*.json", *PARTS, "checkpoint-*", "best")
COPIED = (  # from the training's record
    "trainable_parameters",
    "all_parameters",
    "trainable_percent",
    "train_rows",
    "validation_rows",
    "steps",
    "tokens_seen",
    "tokens_per_second",
    "seconds",
    "train_loss",
    "validation_loss",
    "best_step",
    "peak_memory_bytes",
    "warnings",
)


@dataclass(frozen=True)
class Start:
    """The checkpoint that every arm starts from.

    name: its name in reports; source: a models.Source; prompt: alpaca, chat or none; dense, candidate: for a pruned
    checkpoint the paths of the dense model's and the candidate's records, by which evaluations check its identity.
    """

    name: str
    source: models.Source
    prompt: str
    dense: str | None = None
    candidate: str | None = None


def train(identity, start, plan, member, seed, output, share=None, after=None, survivors=None, world=1):
    """Train one arm and evaluate it, or train it up to a rung of a race, and write the record `output`.

    An arm that does not fit its device, or whose loss becomes NaN, is recorded as not trained, with the reason: the
    other arms continue.

    Args:
        identity: {ablation, arm}.
        start: the Start of all arms.
        plan: {base, finetune, budget, eval_steps, evaluate, choose_by, training_datasets, evaluation_datasets}.
        member: {stage, changes, report} of the arm.
        seed: of the training.
        output: the file to write.
        share: the fraction of the budget to stop at; None trains to the end.
        after: the record of the previous stage's winner, whose settings the arm's changes are applied to.
        survivors: the record of the previous rung; an arm that is not in it is not trained on.
        world: how many processes train together.

    Raises:
        CoppiceError: The number of trainable parameters is not the predicted one.
    """
    clock, output = records.Clock(), Path(output)
    flat = flat_of(plan["base"], member["changes"], after)
    settings = arms.resolved(flat)
    content = identity | {"seed": seed, "stage": member["stage"], "settings": settings, "flat": flat}
    content |= {"start": start.name}
    section = section_of(plan, settings)
    reused = _same_training(after, settings, seed)
    how = recover.TrainingSettings.model_validate(section)
    trained = recover.recovery_of(how).trained
    job = {"identity": identity, "start": start, "plan": plan, "how": how, "seed": seed, "world": world}
    predicted = recover.trainable_parameters(start.source, how)
    race = records.read(survivors) if survivors else None
    if race and identity["arm"] not in race["survivors"] and race["reached"].get(identity["arm"]):
        records.write(output, content | {"raced_out": race["reached"][identity["arm"]][-1]})
        logger.info("%s was stopped by the race and is not trained further", identity["arm"])
        return
    try:
        trained.check_room(predicted)
        # EVA redistributes ranks among the layers and rounds them, so the number of parameters is not known before
        expected = None if settings.get("init") == "eva" else predicted
        _train(**job, output=output.parent, reused=reused, share=share, expected=expected)
    except (recover.DoesNotFit, recover.Diverged) as error:
        again = f"{error}; to try it again, delete {output}"
        records.write(output, content | {"unfit": again, "predicted_parameters": predicted})
        logger.warning("%s was not trained to the end: %s", identity["arm"], error)
        return
    if share:
        reached = records.read(output.parent / recover.RUNG_LOSS_FILE)
        records.write(output, content | {"share": share, "step": reached["step"], LOSS.key: reached[LOSS.key]})
        return
    measured = _evaluate(identity, start, plan, member, trained, seed, output.parent)
    content |= _facts(output.parent, recover.recovery_of(how), predicted)
    content |= {"measured": measured, "data": section["data"], "prompt": start.prompt}
    content["warnings"] = [*content["warnings"], *_warnings_of_evaluations(output.parent, measured)]
    prints = content.pop("fingerprints")
    records.write(output, content | {"provenance": clock.provenance(section, seed, **prints)})


def _facts(output, recovery, predicted):
    """Return the facts in the training's records, the size on disk and the fingerprints."""
    record = records.read(output / "finetuning_config.json")
    facts = {key: record.get(key) for key in COPIED} | {"predicted_parameters": predicted}
    weights = recovery.trained.folder(output).glob("*.safetensors")
    return facts | {
        "stored_bytes": sum(file.stat().st_size for file in weights),
        "history": records.read(output / "training_state.json")["history"],
        "operations": recovery.operations(record["base_parameters"]),
        "reused_from": record.get("reused_from"),
        "fingerprints": record["provenance"]["fingerprints"],
    }


def flat_of(base, changes, after=None):
    """Return the flat settings of an arm: its changes applied to those of the winner `after` (a record), or to `base`.

    Multiples of the rank ("2r") are kept, because a later stage may change the rank.
    """
    return arms.merged(records.read(after)["flat"] if after else base, changes)


def section_of(plan, settings):
    """Return the section `finetune` for the engine, with the budget that all arms share."""
    whole = arms.section(plan["finetune"], settings)
    return whole | {"budget": plan["budget"], "eval_steps": plan["eval_steps"] or whole["eval_steps"]}


def _train(identity, start, plan, how, seed, world, output, reused, share, expected):
    named = {"model": start.name, "config": identity["arm"], "ablation": identity["ablation"]}
    if reused:
        origin = records.read(reused / NAMED[-1])["config"]
        mirror.show(reused, output, named | {"reused_from": origin}, NAMED, OWN)
        logger.info("%s has the settings of %s and uses its training", identity["arm"], origin)
        return
    mirror.clear(output)
    request = recover.TrainingRequest(
        identity=named,
        source=start.source,
        datasets=plan["training_datasets"],
        settings=how,
        prompt=start.prompt,
        output=output,
        seed=seed,
        world=world,
        stop_share=share,
        example_losses=True,
        expected=expected,
    )
    recover.finetune(request)


def _same_training(after, settings, seed):
    """Return the folder of an arm of an earlier stage with the same settings, or None."""
    if not after or settings["train"] == arms.ALL_WEIGHTS:
        return None
    same = [entry["arm"] for entry in records.read(after)["trained"] if entry["settings"] == settings]
    return Path(after).parent / same[-1] / f"seed-{seed}" if same else None


def _evaluate(identity, start, plan, member, trained, seed, output):
    """Evaluate the arm and return on which rows: "selection" if arms are ranked by a metric, "report" if asked for."""
    whole = not trained.adapter
    path = str(trained.folder(output)) if whole else start.source.path
    wanted = [plan["choose_by"]["metric"] != LOSS.key, member["report"]]
    measured = [part for part, asked in zip(PARTS, wanted, strict=True) if asked]
    for part in measured:
        request = evaluate.EvaluationRequest(
            identity={"model": start.name, "config": identity["arm"], "stage": "finetuned"},
            source=models.Source(**vars(start.source) | {"path": path}),
            settings=evaluate.Evaluate.model_validate(plan["evaluate"] if part == "report" else _ranking(plan)),
            datasets=plan["evaluation_datasets"],
            output=output / part,
            adapter=None if whole else output,
            purpose=part,
            seed=seed,
            dense=None if whole else start.dense,
            candidate=None if whole else start.candidate,
            prompt=start.prompt,
        )
        evaluate.evaluate(request)
    return measured


def _warnings_of_evaluations(output: Path, measured: list[str]) -> list[str]:
    """Return what the evaluations of an arm, in the folder `output`, warn of."""
    found = {f"{part} rows": records.read(output / part / "evaluation_results.json")["warnings"] for part in measured}
    return formatting.warned(found)


def _ranking(plan):
    """Return the section `evaluate` reduced to the data sets of the metric that ranks the arms."""
    whole = plan["evaluate"]
    return whole | {section: whole[section] | lists for section, lists in arms.chosen_by(plan).items()}
