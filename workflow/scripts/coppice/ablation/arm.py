"""Train and evaluate one arm of an ablation with one seed, and write its record `arm.json`.

The arm's folder holds the files of any fine-tuning, `validation_losses.json`, and, if the arm is evaluated, the records
of an evaluation in `selection/` and `report/`. A rerun repeats nothing that is finished: the training continues from
its newest checkpoint, and an evaluation keeps its finished parts.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from coppice import models
from coppice.core import mirror, records
from coppice.core.aliases import PathLike, Record
from coppice.render import formatting
from coppice.stages import evaluate, recover
from coppice.stages.recover.base import Trained
from coppice.stats.metrics import LOSS
from coppice.study.settings import arms
from coppice.study.settings.resolved import Budget, StudyArm
from coppice.study.settings.sections.ablation import ChooseBy
from coppice.study.settings.sections.evaluate import Evaluate
from coppice.study.settings.sections.finetune import Finetune
from coppice.study.settings.sections.section import Section, setting

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
    """The checkpoint that every arm starts from."""

    name: str
    """Its name in reports."""
    source: models.Source
    """Where it lies, and how it is loaded."""
    prompt: str
    """The prompt format: alpaca, chat or none."""
    dense: str | None = None
    """For a pruned checkpoint, the dense model's model.json; evaluations check the identity by it."""
    candidate: str | None = None
    """For a pruned checkpoint, the candidate's pruning.json; evaluations check the identity by it."""
    teacher: models.Source | None = None
    """The model that all arms learn from, if their objective has one."""


class ArmPlan(Section):
    """What all arms of an ablation share."""

    base: Record = setting(..., "The flat settings that arms change.")
    budget: Budget = setting(..., "The length of the training.")
    eval_steps: int | None = setting(..., "Steps between two validation losses. None means the value in `finetune`.")
    choose_by: ChooseBy = setting(..., "The metric that ranks the arms.")
    finetune: Finetune = setting(..., "The section `finetune`; each arm has its own adapter and training settings.")
    evaluate: Evaluate = setting(..., "The section `evaluate` for the metrics of the report.")
    training_datasets: dict[str, str | Path] = setting(..., "Name -> path of dataset.json, to train and validate on.")
    evaluation_datasets: dict[str, str] = setting(..., "Name -> path of dataset.json, for the texts and tasks.")

    @classmethod
    def of(cls, plan: Record, execution: Record) -> Self:
        """Return the plan from the parameters of a rule: `execution` completes the sections that it names."""
        return cls.model_validate(plan | {section: plan[section] | more for section, more in execution.items()})


@dataclass(frozen=True)
class ArmRequest:
    """One arm with one seed: what to train, how far, and where to write it."""

    identity: dict[str, str]
    """{ablation, arm}, written to every record."""
    start: Start
    """The checkpoint that all arms start from."""
    plan: ArmPlan
    """What all arms share."""
    member: StudyArm
    """What this arm changes, and how it is measured."""
    seed: int
    """Seed of the training."""
    output: Path
    """The record to write; the folder that holds it is the arm's."""
    share: float | None = None
    """The fraction of the budget to stop at, at a rung of a race. None trains to the end."""
    after: PathLike | None = None
    """The record of the previous stage's winner, whose settings the arm's changes are applied to."""
    survivors: PathLike | None = None
    """The record of the previous rung; an arm that is not in it is not trained on."""
    world: int = 1
    """The number of processes that train together."""

    @property
    def folder(self) -> Path:
        """The arm's folder."""
        return self.output.parent


def train(request: ArmRequest) -> None:
    """Train one arm and evaluate it, or train it up to a rung of a race, and write its record.

    An arm that does not fit its device, or whose loss becomes NaN, is recorded as not trained, with the reason: the
    other arms continue.

    Raises:
        CoppiceError: The number of trainable parameters is not the predicted one.
    """
    clock, output, member, start = records.Clock(), request.output, request.member, request.start
    flat = flat_of(request.plan.base, member.changes, request.after)
    settings = arms.resolved(flat)
    content: Record = request.identity | {
        "seed": request.seed,
        "stage": member.stage,
        "settings": settings,
        "flat": flat,
    }
    content |= {"start": start.name}
    section = section_of(request.plan, settings)
    reused = _same_training(request.after, settings, request.seed)
    how = recover.TrainingSettings.model_validate(section)
    trained = recover.recovery_of(how).trained
    predicted = recover.trainable_parameters(start.source, how)
    race, name = records.read(request.survivors) if request.survivors else None, request.identity["arm"]
    if race and name not in race["survivors"] and race["reached"].get(name):
        records.write(output, content | {"raced_out": race["reached"][name][-1]})
        logger.info("%s was stopped by the race and is not trained further", name)
        return
    try:
        trained.check_room(predicted)
        # EVA redistributes ranks among the layers and rounds them, so the number of parameters is not known before
        _train(request, how, reused, expected=None if settings.get("init") == "eva" else predicted)
    except (recover.DoesNotFit, recover.Diverged) as error:
        again = f"{error}; to try it again, delete {output}"
        records.write(output, content | {"unfit": again, "predicted_parameters": predicted})
        logger.warning("%s was not trained to the end: %s", name, error)
        return
    if request.share:
        reached = records.read(request.folder / recover.RUNG_LOSS_FILE)
        records.write(output, content | {"share": request.share, "step": reached["step"], LOSS.key: reached[LOSS.key]})
        return
    measured = _evaluate(request, trained)
    content |= _facts(request.folder, how, predicted)
    content |= {"measured": measured, "data": section["data"], "prompt": start.prompt}
    content["warnings"] = [*content["warnings"], *_warnings_of_evaluations(output.parent, measured)]
    prints = content.pop("fingerprints")
    records.write(output, content | {"provenance": clock.provenance(section, request.seed, **prints)})


def _facts(output: Path, how: recover.TrainingSettings, predicted: int) -> Record:
    """Return the facts in the training's records, the size on disk and the fingerprints."""
    record = records.read(output / "finetuning_config.json")
    teacher = recover.Teacher(record["teacher"]["parameters"]) if "teacher" in record else None
    recovery = recover.recovery_of(how, teacher)
    facts = {key: record.get(key) for key in COPIED} | {"predicted_parameters": predicted}
    weights = recovery.trained.folder(output).glob("*.safetensors")
    return facts | {
        "stored_bytes": sum(file.stat().st_size for file in weights),
        "history": records.read(output / "training_state.json")["history"],
        "operations": recovery.operations(record["base_parameters"]),
        "reused_from": record.get("reused_from"),
        "fingerprints": record["provenance"]["fingerprints"],
    }


def flat_of(base: Record, changes: Record, after: PathLike | None = None) -> Record:
    """Return the flat settings of an arm: its changes applied to those of the winner `after` (a record), or to `base`.

    Multiples of the rank ("2r") are kept, because a later stage may change the rank.
    """
    return arms.merged(records.read(after)["flat"] if after else base, changes)


def section_of(plan: ArmPlan, settings: Record) -> Record:
    """Return the section `finetune` for the engine, with the budget that all arms share."""
    whole = arms.section(plan.finetune, settings)
    return whole | {"budget": plan.budget.model_dump(), "eval_steps": plan.eval_steps or whole["eval_steps"]}


def _train(request: ArmRequest, how: recover.TrainingSettings, reused: Path | None, expected: int | None) -> None:
    """Train the arm, or show the training in the folder `reused`, which has the same settings."""
    start, identity, output = request.start, request.identity, request.folder
    named = {"model": start.name, "config": identity["arm"], "ablation": identity["ablation"]}
    if reused:
        origin = records.read(reused / NAMED[-1])["config"]
        mirror.show(reused, output, named | {"reused_from": origin}, NAMED, OWN)
        logger.info("%s has the settings of %s and uses its training", identity["arm"], origin)
        return
    mirror.clear(output)
    training = recover.TrainingRequest(
        identity=named,
        source=start.source,
        datasets=request.plan.training_datasets,
        settings=how,
        prompt=start.prompt,
        output=output,
        seed=request.seed,
        teacher=start.teacher,
        world=request.world,
        stop_share=request.share,
        example_losses=True,
        expected=expected,
    )
    recover.finetune(training)


def _same_training(after: PathLike | None, settings: Record, seed: int) -> Path | None:
    """Return the folder of an arm of an earlier stage with the same settings, or None."""
    if not after or settings["train"] == arms.ALL_WEIGHTS:
        return None
    same = [entry["arm"] for entry in records.read(after)["trained"] if entry["settings"] == settings]
    return Path(after).parent / same[-1] / f"seed-{seed}" if same else None


def _evaluate(request: ArmRequest, trained: Trained) -> list[str]:
    """Evaluate the arm and return on which rows: "selection" if arms are ranked by a metric, "report" if asked for."""
    plan, start, output, whole = request.plan, request.start, request.folder, not trained.adapter
    path = str(trained.folder(output)) if whole else start.source.path
    wanted = [plan.choose_by.metric != LOSS.key, request.member.report]
    measured = [part for part, asked in zip(PARTS, wanted, strict=True) if asked]
    for part in measured:
        evaluation = evaluate.EvaluationRequest(
            identity={"model": start.name, "config": request.identity["arm"], "stage": "finetuned"},
            source=models.Source(**vars(start.source) | {"path": path}),
            settings=plan.evaluate if part == "report" else _ranking(plan),
            datasets=plan.evaluation_datasets,
            output=output / part,
            adapter=None if whole else output,
            purpose=part,
            seed=request.seed,
            dense=None if whole else start.dense,
            candidate=None if whole else start.candidate,
            prompt=start.prompt,
        )
        evaluate.evaluate(evaluation)
    return measured


def _warnings_of_evaluations(output: Path, measured: list[str]) -> list[str]:
    """Return what the evaluations of an arm, in the folder `output`, warn of."""
    found = {f"{part} rows": records.read(output / part / "evaluation_results.json")["warnings"] for part in measured}
    return formatting.warned(found)


def _ranking(plan: ArmPlan) -> Evaluate:
    """Return the section `evaluate` reduced to the data sets of the metric that ranks the arms."""
    chosen = arms.chosen_by(plan.choose_by, plan.evaluate)
    parts = {name: getattr(plan.evaluate, name).model_copy(update=lists) for name, lists in chosen.items()}
    return plan.evaluate.model_copy(update=parts)
