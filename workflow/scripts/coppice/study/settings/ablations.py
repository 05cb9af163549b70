"""Resolve and check the section `ablations`: arms, budgets, stages and metrics, before anything is trained."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from coppice.core.aliases import Record
from coppice.core.errors import SettingsError, nearest
from coppice.models import kinds
from coppice.stats.metrics import LOSS, asked_in, named

from .. import layout
from . import arms, checking, lora_presets, own_sections, registry, rerun_policy, training_checks
from .own_sections import Sections
from .resolved import Budget, CheckpointStart, ModelStart, Race, StudyAblation, StudyArm, StudyStage, Unit
from .sections import Config
from .sections.ablation import Ablation, Arm, ArmMetrics, ChooseBy, Racing, Start, TuningStage
from .sections.evaluate import Evaluate
from .sections.finetune import Finetune
from .sources import absolute, check_name, check_paths, check_rows, kind_at

STEPS: Final = "max_steps"
TOKENS: Final = "tokens"
UNITS: tuple[Unit, ...] = (STEPS, TOKENS, "flops")
DEFAULT_STEPS = 5000
OF_CHECKPOINT = ("prompt", "dtype", "trust_remote_code", "context_length", "eos_token")  # for a model: under models
KINDS = ("arms", "grid", "staged")
START, COMBINATION, VALIDATION = "start", "combination", "validation"
# The order in which practitioners tune LoRA: the most important setting first, each stage from the best one so far
USUAL_ORDER = [
    TuningStage(name="rank", vary={"r": [8, 16, 32, 64, 128]}, **{"with": {"alpha": "2r"}}),
    TuningStage(name="alpha", vary={"alpha": ["r", "2r", "4r"]}),
    TuningStage(name="dropout", vary={"dropout": [0.0, 0.05, 0.1, 0.2, 0.3]}),
    TuningStage(name="bias", vary={"bias": ["none", "lora_only", "all"]}),
    TuningStage(
        name="targets",
        vary={"target_modules": [["q_proj", "v_proj"], "attention", ["attention", "mlp"]]},
    ),
    TuningStage(name="variants", vary={"use_rslora": [False, True], "use_dora": [False, True]}),
]


def resolve(
    config: Config,
    of_models: Mapping[str, kinds.ModelKind],
    sections: Sections,
    criteria: Mapping[str, Mapping[str, Record]],
    workdir: str,
    notices: list[str],
) -> dict[str, StudyAblation]:
    """Return {name: ablation} of the configuration. Ablations of models or configs outside the study get a notice.

    Args:
        config: the configuration.
        of_models: model -> its kind.
        sections: those of the study and of its models; an ablation has those of the model that it starts from.
        criteria: model -> its criteria.
        workdir: the folder that relative paths resolve against.
        notices: a list to which notices are added.

    Raises:
        SettingsError: the message names the key.
    """
    found = {}
    for name, entry in config.ablations.items():
        key = f"config key ablations.{name}"
        check_name(name, "config key ablations")
        if not _in_study(key, entry.start, config, criteria, notices):
            continue
        start = entry.start
        kind = of_models.get(start.model) or kind_at(start.checkpoint or "", f"ablations.{name}.start", workdir)
        own = _sections_of(start, sections, kind)
        found[name] = _ablation(key, entry, config.seed, own, workdir, notices)
        if kind is not None:
            training_checks.check_arms(key, start, found[name], kind)
    return found


def _sections_of(start: Start, sections: Sections, kind: kinds.ModelKind | None) -> Sections:
    """Return the sections of the model that an ablation starts from; of a checkpoint, those that apply to its kind."""
    if start.model is not None:
        return Sections(sections.finetune_of[start.model], sections.evaluate_of[start.model])
    return sections if kind is None else Sections(sections.finetune, own_sections.applicable(sections.evaluate, kind))


def _in_study(
    key: str, start: Start, config: Config, criteria: Mapping[str, Mapping[str, Record]], notices: list[str]
) -> bool:
    """Return whether the model and config that an ablation starts from are in the study; add a notice if not."""
    for valid, wanted in ((config.models, start.model), (config.select.configs, start.config)):
        if wanted is not None and wanted not in valid:
            hint = nearest(wanted, valid)
            notices.append(f"{key}: '{wanted}' is not in the study, so the ablation is ignored{hint}")
            return False
    if start.model is not None and start.config not in (None, *criteria[start.model]):
        notices.append(f"{key}: '{start.config}' is left out for model '{start.model}', so the ablation is ignored")
        return False
    return True


def _ablation(
    key: str, entry: Ablation, seed: int, sections: Sections, workdir: str, notices: list[str]
) -> StudyAblation:
    base = _arm(entry.base, f"{key}.base")
    finetune = _section(key, entry, sections.finetune)
    below = arms.merged(arms.flat(finetune), base)
    stages, members = _stages(key, entry)
    budget = _budget(key, entry.budget.given())
    metrics = _metrics(key, entry.metrics, sections.evaluate, notices)
    _check_arms(key, members, below, budget)
    _check_teacher(key, entry.start, finetune)
    if stages and not own_sections.names_in(metrics):
        raise SettingsError(
            f"{key}.metrics: a staged ablation ends with a comparison on data that no stage used, and none is given; "
            "name a task, a text or another data set that the model is evaluated on"
        )
    return StudyAblation(
        start=_start(key, entry.start.given(), workdir),
        finetune=finetune,
        base=below,
        budget=budget,
        seeds=entry.seeds or [seed],
        eval_steps=entry.eval_steps,
        evaluate=metrics,
        choose_by=_criterion(key, entry.choose_by, metrics),
        stages=stages,
        arms=members,
        reference=_reference(key, entry.reference, members, stages),
        racing=_racing(key, entry.racing, stages, budget),
    )


def _start(key: str, start: Record, workdir: str) -> ModelStart | CheckpointStart:
    if ("model" in start) == ("checkpoint" in start):
        raise SettingsError(f"{key}.start: name either a model of the study or a checkpoint folder")
    of_checkpoint = [name for name in OF_CHECKPOINT if name in start]
    if "checkpoint" in start:
        if "config" in start:
            raise SettingsError(f"{key}.start.config: needs a model of the study; remove config, or name a model")
        path = absolute(start["checkpoint"], workdir)
        check_paths(layout.files_below(path), f"{key}.start.checkpoint")
        loading = {"dtype": start.get("dtype"), "trust_remote_code": start.get("trust_remote_code", False)}
        loading |= {name: start.get(name) for name in ("context_length", "eos_token")}
        return CheckpointStart(path=path, prompt=start.get("prompt", "alpaca"), **loading)
    if of_checkpoint:
        raise SettingsError(f"{key}.start.{of_checkpoint[0]}: needs a checkpoint; for a model, set it under models")
    return ModelStart(model=start["model"], config=start.get("config"))


def _check_teacher(key: str, start: Start, finetune: Finetune) -> None:
    """Reject arms that would learn from the checkpoint that they start from, or from none."""
    if finetune.objective.kl and start.config is None and finetune.objective.teacher in (None, start.model):
        raise SettingsError(
            f"{key}.start: finetune.objective needs another teacher, because no config chose this start; set "
            "finetune.objective.teacher to another model of the study"
        )


def _section(key: str, entry: Ablation, finetune: Finetune) -> Finetune:
    """Return the section `finetune` that all arms share."""
    data = finetune.data.model_copy(update=entry.data.given())
    if not data.val_size and not data.validation:
        raise SettingsError(f"{key}.data.val_size: arms are compared by the validation loss; hold out some rows")
    check_rows(data, f"{key}.data")
    # Early stopping is off because all arms must spend the same budget, which also replaces max_steps
    own = {"early_stopping": None, "merge": False, "seeds": None, "max_steps": None}
    return finetune.model_copy(update={"data": data} | own)


def _stages(key: str, entry: Ablation) -> tuple[list[StudyStage], dict[str, StudyArm]]:
    """Return (stages, arms) from whichever of `KINDS` the ablation has."""
    given = [kind for kind in KINDS if getattr(entry, kind)]
    if len(given) != 1:
        raise SettingsError(f"{key}: found {', '.join(given) or 'none'} of {', '.join(KINDS)}; give exactly one")
    if given == ["staged"]:
        return _staged(f"{key}.staged", entry.staged if isinstance(entry.staged, list) else USUAL_ORDER)
    changes = _combinations(f"{key}.grid", entry.grid) if entry.grid else _listed(f"{key}.arms", entry.arms or [])
    return [], {name: StudyArm(changes=arm) for name, arm in changes.items()}


def _listed(key: str, entries: Iterable[str | Arm]) -> dict[str, Record]:
    changes = {}
    for place, entry in enumerate(entries):
        arm = _arm(entry, f"{key}[{place}]")
        name = arms.name_of(arm)
        check_name(name, f"{key}[{place}].name")
        if name in changes:
            raise SettingsError(f"{key}[{place}]: there is already an arm '{name}'; give this one another name")
        changes[name] = arm
    return changes


def _staged(key: str, entries: Iterable[TuningStage]) -> tuple[list[StudyStage], dict[str, StudyArm]]:
    stages: list[StudyStage] = []
    members: dict[str, StudyArm] = {}
    after = None
    for place, entry in enumerate(entries):
        at, name = f"{key}[{place}]", entry.name
        check_name(name, f"{at}.name")
        if name in (START, COMBINATION, VALIDATION) or name in [stage.name for stage in stages]:
            raise SettingsError(f"{at}.name: '{name}' is already taken; give the stage another name")
        both = next((one for one in entry.with_ if one in entry.vary), None)
        if both:
            raise SettingsError(f"{at}.with.{both}: this stage varies the key already; remove it from with or vary")
        more = _checked(entry.with_, f"{at}.with")
        changes = {arm: more | own for arm, own in _combinations(f"{at}.vary", entry.vary).items()}
        if len(changes) < 2:
            raise SettingsError(f"{at}.vary: has only one value, so there is nothing to choose; name at least two")
        own = {f"{name}.{arm}": arm_changes for arm, arm_changes in changes.items()}
        members |= {arm: StudyArm(stage=name, changes=one, after=after, report=False) for arm, one in own.items()}
        stages.append(StudyStage(name=name, arms=list(own), after=after))
        after = name
    final = {START: None, COMBINATION: after}
    return stages, members | {arm: StudyArm(stage=VALIDATION, changes={}, after=last) for arm, last in final.items()}


def _combinations(key: str, values: Mapping[str, Iterable[object]]) -> dict[str, Record]:
    for name in values:
        valid = [one for one in Arm.model_fields if one not in (*arms.NAMED, "train")]
        if name not in valid:
            raise SettingsError(
                f"{key}: '{name}' is not a key of an arm; valid are {', '.join(valid)}{nearest(name, valid)}"
            )
    if not values:
        raise SettingsError(f"{key}: names no key; name at least one with a list of values")
    checked = {name: [_checked({name: value}, key)[name] for value in several] for name, several in values.items()}
    try:
        return arms.combinations(checked)
    except SettingsError as error:
        raise SettingsError(f"{key}.{error}") from None


def _arm(entry: str | Arm, key: str) -> Record:
    """Return an arm as a mapping. Text is the name of a preset or, if there is none of that name, of a scheme."""
    if not isinstance(entry, str):
        return _agreeing(entry.given(), key)
    if entry in lora_presets.PRESETS:
        return {"preset": entry}
    if entry in lora_presets.SCHEMES:
        return {"name": entry, "scheme": entry}
    valid = [*lora_presets.PRESETS, *(name for name in lora_presets.SCHEMES if name not in lora_presets.PRESETS)]
    raise SettingsError(
        f"{key}: there is no preset or scheme '{entry}'; valid are {', '.join(valid)}{nearest(entry, valid)}"
    )


def _checked(arm: Record, key: str) -> Record:
    """Return the keys that an arm sets. Raises SettingsError if a key or value is wrong."""
    values = checking.checked(Arm, arm, (key.removeprefix("config key "),)).given()
    # In the order of the file, which records of arms have
    return _agreeing({name: values[name] for name in arm}, key)


def _agreeing(found: Record, key: str) -> Record:
    """Return the keys that an arm sets, as plain values. Raises SettingsError if they conflict."""
    if "towers" in found:
        own = found["towers"].items()
        found = found | {"towers": {name: one if isinstance(one, str) else one.model_dump() for name, one in own}}
    if found.get("preset") and found.get("scheme"):
        raise SettingsError(f"{key}: has both a preset and a scheme; remove one of them")
    adapter = next((name for name in (*arms.ADAPTER, "preset", "scheme") if name in found), None)
    if found.get("train") == arms.ALL_WEIGHTS and adapter:
        raise SettingsError(f"{key}.{adapter}: is a setting of an adapter, but train is 'all'; remove one of them")
    try:
        sound = 0 < arms.scale(found.get("alpha", 1), 1) < math.inf
    except (ValueError, OverflowError):
        sound = False
    if not sound:
        raise SettingsError(
            f"{key}.alpha: found '{found['alpha']}'; give a number above 0, or a multiple of the rank such as r or 2r"
        )
    return found


def _budget(key: str, budget: Record) -> Budget:
    given = [unit for unit in UNITS if unit in budget]
    if len(given) > 1:
        raise SettingsError(f"{key}.budget: found {' and '.join(given)}; keep one unit")
    unit = given[0] if given else STEPS
    return Budget(unit=unit, amount=budget.get(unit, DEFAULT_STEPS))


def _check_arms(key: str, members: Mapping[str, StudyArm], below: Record, budget: Budget) -> None:
    """Raise SettingsError if an arm repeats another, conflicts with `base`, or cannot train within the budget."""
    seen = {}
    for name, member in members.items():
        whole = arms.merged(below, member.changes)
        adapter = next((one for one in member.changes if one in (*arms.ADAPTER, "preset", "scheme")), None)
        if whole["train"] == arms.ALL_WEIGHTS and adapter:
            raise SettingsError(
                f"{key}: arm '{name}' sets {adapter}, but trains all weights; give it train: lora, or remove train "
                "from base"
            )
        try:
            settings = arms.resolved(whole)
        except ValueError:
            raise SettingsError(f"{key}.base.alpha: found '{whole['alpha']}'; give a number, r or 2r") from None
        _check_budget(key, name, settings, below, budget)
        if member.stage == VALIDATION:
            continue
        # Arms of a later stage are compared by their changes alone, because the settings depend on earlier winners
        of = sorted(settings.items()) if member.after is None else sorted(member.changes.items())
        same = repr([member.after, member.stage, of])
        if same in seen:
            raise SettingsError(f"{key}: the arms '{seen[same]}' and '{name}' are the same training; remove one")
        seen[same] = name
    if len(members) < 2:
        raise SettingsError(f"{key}: has only one arm, '{next(iter(members))}'; add another to compare it with")


def _check_budget(key: str, name: str, settings: Record, below: Record, budget: Budget) -> None:
    amount, size = budget.amount, settings["batch_size"]
    if budget.unit == STEPS:
        if settings["warmup_steps"] >= amount:
            raise SettingsError(
                f"{key}.budget.max_steps: found {amount}, but arm '{name}' warms up for {settings['warmup_steps']} "
                "steps and would never reach its learning rate; raise the budget, or lower warmup_steps"
            )
        if size != below["batch_size"]:
            raise SettingsError(
                f"{key}: arm '{name}' has batch_size {size}, others {below['batch_size']}; with a budget of steps they "
                "would train on different numbers of examples; set budget.tokens instead"
            )
    if budget.unit == TOKENS and amount < 2 * size:
        raise SettingsError(
            f"{key}.budget.tokens: found {amount:g}, but arm '{name}' spends more than that in its first step of "
            f"{size} examples; raise the budget"
        )


def _metrics(key: str, chosen: ArmMetrics, evaluate: Evaluate, notices: list[str]) -> Evaluate:
    """Return the section `evaluate` for the arms: the model's metrics or part of them, without cost and prompts."""
    measured = {}
    for part, valid in own_sections.data_of(evaluate).items():
        name = "tasks" if part == "zero_shot" else part
        measured[part] = _measured(f"{key}.metrics.{name}", getattr(chosen, name), valid, notices)
    tasks = evaluate.zero_shot
    limit = tasks.limit if chosen.limit is None else chosen.limit
    zero_shot = tasks.model_dump() | {"tasks": measured["zero_shot"], "limit": limit}
    narrowed = rerun_policy.narrowed(evaluate.model_dump(), measured)
    return Evaluate.model_validate(narrowed | {"zero_shot": zero_shot})


def _measured(key: str, chosen: list[str] | None, valid: list[str], notices: list[str]) -> list[str]:
    """Return the chosen names, all `valid` ones by default.

    A default task or text that this study does not evaluate is ignored with a notice, so that a shipped ablation works
    in other studies. Any other name raises SettingsError.
    """
    for name in chosen or []:
        if name not in valid and name not in (*registry.TASKS, *registry.DATASETS):
            listed = ", ".join(valid) or "none"
            raise SettingsError(
                f"{key}: the study does not evaluate '{name}'; valid are {listed}{nearest(name, valid)}"
            )
        if name not in valid:
            notices.append(f"{key}: the study does not evaluate '{name}', so it is ignored")
    return valid if chosen is None else [name for name in chosen if name in valid]


def _criterion(key: str, chosen: ChooseBy, evaluate: Evaluate) -> ChooseBy:
    """Return the metric that ranks the arms, with its direction."""
    valid = [LOSS.key, *(metric.key for metric in asked_in(evaluate))]
    if chosen.metric not in valid:
        raise SettingsError(
            f"{key}.choose_by.metric: found '{chosen.metric}'; valid are {', '.join(valid)}"
            f"{nearest(chosen.metric, valid)}"
        )
    return ChooseBy(metric=chosen.metric, mode=chosen.mode or named(chosen.metric).mode)


def _reference(key: str, wanted: str | None, members: Mapping[str, StudyArm], stages: Sequence[StudyStage]) -> str:
    if wanted is None:
        return START if stages else next(iter(members))
    reported = [name for name, member in members.items() if member.report]
    if wanted not in reported:
        raise SettingsError(
            f"{key}.reference: there is no arm '{wanted}' to compare with; valid are {', '.join(reported)}"
            f"{nearest(wanted, reported)}"
        )
    return wanted


def _racing(key: str, racing: Racing | None, stages: Sequence[StudyStage], budget: Budget) -> Race | None:
    """Return the race, or None if all arms train to the end."""
    if racing is None:
        return None
    if stages:
        raise SettingsError(f"{key}.racing: a staged ablation cannot race; remove racing, or use arms or grid")
    rungs = [racing.eta ** -(racing.rungs - place) for place in range(racing.rungs)]
    if budget.unit == STEPS and budget.amount * rungs[0] < 1:
        raise SettingsError(
            f"{key}.racing: the first of {racing.rungs} rungs comes before the first of {budget.amount} steps; "
            "lower rungs or eta, or raise the budget"
        )
    return Race(eta=racing.eta, rungs=rungs)
