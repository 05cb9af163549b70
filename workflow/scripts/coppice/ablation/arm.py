"""One arm of an ablation with one seed: trained, measured, and summed up in `arm.json`.

The arm's folder holds what any fine-tuning leaves, `validation_losses.json`, and where it was measured `selection/` and
`report/` with the records of an evaluation. What is finished of it is not done again: the training goes on from its
newest checkpoint, the evaluations from their finished parts.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from coppice import models
from coppice.core import records
from coppice.stages import evaluate, recover
from coppice.study.settings import arms

logger = logging.getLogger("coppice.ablation")

LOSS = "validation_loss"
PARTS = ("selection", "report")
COPIED = (
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
    """Where every arm begins: the checkpoint (a models.Source), the form of its prompts, what guards its identity.

    name: what reports call it; dense, selection: paths of the records of a pruned checkpoint's origin, or None.
    """

    name: str
    source: models.Source
    prompt: str
    dense: str | None = None
    selection: str | None = None


def train(identity, start, plan, member, seed, output, share=None, after=None, survivors=None, world=1):
    """Train one arm to the end and measure it, or up to so large a `share` of its budget; `output` is the record.

    identity: {ablation, arm}; plan: {base, finetune, budget, eval_steps, evaluate, choose_by, training_datasets,
    evaluation_datasets} of the ablation; member: {stage, changes, report} of the arm; after: the record of the winner
    that its changes are laid over; survivors: the record of the rung before, by which an arm may be out of the race;
    world: processes that train together. An arm that does not fit its device, or whose loss is no number, is noted as
    such. Raises CoppiceError where the parameters that are trained are not those that the configuration lets expect.
    """
    clock, output = records.Clock(), Path(output)
    flat = flat_of(plan["base"], member["changes"], after)
    settings = arms.settled(flat)
    content = identity | {"seed": seed, "stage": member["stage"], "settings": settings, "flat": flat}
    content |= {"start": start.name}
    section = section_of(plan, settings)
    reused = _same_training(after, settings, seed)
    job = {"identity": identity, "start": start, "plan": plan, "section": section, "seed": seed, "world": world}
    predicted = recover.trainable_parameters(start.source, section)
    race = records.read(survivors) if survivors else None
    if race and identity["arm"] not in race["survivors"] and race["reached"].get(identity["arm"]):
        records.write(output, content | {"raced_out": race["reached"][identity["arm"]][-1]})
        logger.info("%s: raced out, not trained on", identity["arm"])
        return
    try:
        if settings["train"] == arms.ALL_WEIGHTS:
            recover.check_room(predicted)
        # EVA gives ranks to the layers as their inputs vary: the sum is rounded
        expected = None if settings.get("init") == "eva" else predicted
        _train(**job, output=output.parent, reused=reused, share=share, expected=expected)
    except (recover.DoesNotFit, recover.Diverged) as error:
        again = f"{error}; to try it again, delete {output}"
        records.write(output, content | {"unfit": again, "predicted_parameters": predicted})
        logger.warning("%s: not trained to the end: %s", identity["arm"], error)
        return
    if share:
        reached = records.read(output.parent / recover.REACHED)
        records.write(output, content | {"share": share, "step": reached["step"], LOSS: reached[LOSS]})
        return
    measured = _evaluate(identity, start, plan, member, settings, seed, output.parent)
    content |= _facts(output.parent, settings, predicted)
    content |= {"measured": measured, "data": section["data"], "prompt": start.prompt}
    prints = content.pop("fingerprints")
    records.write(output, content | {"provenance": clock.provenance(section, seed, **prints)})


def _facts(output, settings, predicted):
    """What the records of the training say, its size and its fingerprints."""
    trained = records.read(output / "finetuning_config.json")
    facts = {key: trained.get(key) for key in COPIED} | {"predicted_parameters": predicted}
    return facts | {
        "stored_bytes": _stored(output, settings),
        "history": records.read(output / "training_state.json")["history"],
        "operations": recover.OPERATIONS[settings["train"]] * trained["base_parameters"],
        "reused_from": trained.get("reused_from"),
        "fingerprints": trained["provenance"]["fingerprints"],
    }


def flat_of(base, changes, after=None):
    """The flat settings of an arm, multiples of the rank left as they are: its changes over those of the winner `after`
    (a record), else over `base`."""
    return arms.laid_over(records.read(after)["flat"] if after else base, changes)


def section_of(plan, settings):
    """The section `finetune` that the engine gets, with the budget that all arms share."""
    whole = arms.section(plan["finetune"], settings)
    return whole | {"budget": plan["budget"], "eval_steps": plan["eval_steps"] or whole["eval_steps"]}


def _train(identity, start, plan, section, seed, world, output, reused, share, expected):
    recover.finetune(
        identity={"model": start.name, "config": identity["arm"], "ablation": identity["ablation"]},
        source=start.source,
        datasets=plan["training_datasets"],
        settings=section,
        prompt=start.prompt,
        output=output,
        seed=seed,
        world=world,
        reused=reused,
        until=share,
        each=True,
        expected=expected,
    )


def _same_training(after, settings, seed):
    """The folder of an earlier stage's arm that is the very same training, or None."""
    if not after or settings["train"] == arms.ALL_WEIGHTS:
        return None
    same = [entry["arm"] for entry in records.read(after)["trained"] if entry["settings"] == settings]
    return Path(after).parent / same[-1] / f"seed-{seed}" if same else None


def _evaluate(identity, start, plan, member, settings, seed, output):
    """The parts in which the arm was measured: on selection rows where it is chosen by them, on report rows."""
    whole = settings["train"] == arms.ALL_WEIGHTS
    path = str(output / recover.MODEL) if whole else start.source.path
    wanted = [plan["choose_by"]["metric"] != LOSS, member["report"]]
    measured = [part for part, asked in zip(PARTS, wanted, strict=True) if asked]
    for part in measured:
        evaluate.evaluate(
            identity={"model": start.name, "config": identity["arm"], "stage": "finetuned"},
            source=models.Source(**vars(start.source) | {"path": path}),
            settings=plan["evaluate"] if part == "report" else _ranking(plan),
            datasets=plan["evaluation_datasets"],
            output=output / part,
            adapter=None if whole else output,
            purpose=part,
            seed=seed,
            dense=None if whole else start.dense,
            selection=None if whole else start.selection,
            prompt=start.prompt,
        )
    return measured


def _ranking(plan):
    """The section `evaluate` with what the metric that ranks the arms is measured on, alone."""
    texts, tasks = arms.chosen_by(plan)
    whole = plan["evaluate"]
    return whole | {
        "zero_shot": whole["zero_shot"] | {"tasks": tasks},
        "perplexity": whole["perplexity"] | {"datasets": texts},
    }


def _stored(output, settings):
    """Bytes of what the training leaves to be kept: the adapter's weights, or those of the whole model."""
    folder = output / recover.MODEL if settings["train"] == arms.ALL_WEIGHTS else output
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
