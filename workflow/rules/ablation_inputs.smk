"""Path patterns and input functions of the ablation rules.

Input: the study's ablations as `settings` resolved them.
Output: the paths of arms, winners and rungs, and the functions that say which of them each job needs.
"""

from coppice.ablation import figures as ablation_figures

ABLATION = f"{RESULTS}/ablation/{{ablation}}"
ARM = f"{ABLATION}/{{arm}}/seed-{{seed}}"
WINNER = f"{ABLATION}/winner-{{stage}}.json"
RUNG = f"{ARM}/rung-{{rung}}.json"
SURVIVORS = f"{ABLATION}/rung-{{rung}}.json"


wildcard_constraints:
    ablation="|".join(map(re.escape, study.ablations)) or "(?!)",
    arm="|".join(
        {re.escape(arm) for one in study.ablations.values() for arm in one.arms}
    )
    or "(?!)",
    seed=r"\d+",
    stage=r"[A-Za-z0-9][A-Za-z0-9._+-]*",
    rung=r"\d+",


def ablation_of(wildcards):
    return study.ablations[wildcards.ablation]


def arm_of(wildcards):
    return ablation_of(wildcards).arms[wildcards.arm]


def number_of_rungs(wildcards):
    racing = ablation_of(wildcards).racing
    return len(racing.rungs) if racing else 0


def start_inputs(wildcards):
    """Return the records, or the user's files, that define the checkpoint an ablation starts from."""
    start = ablation_of(wildcards).start
    taught = study.teacher_of_arms(wildcards.ablation)
    teacher = {} if taught is None else {"teacher": files.model(taught)}
    if start.kind == "checkpoint":
        return {"checkpoint": layout.files_below(start.path)} | teacher
    dense = {"dense": files.model(start.model)} | teacher
    if start.config is None:
        return dense
    chosen = SELECTION.format(model=start.model, config=start.config)
    return dense | {"selection": chosen}


def start_loading(wildcards):
    """Return the settings by which that checkpoint is loaded, as a rule parameter."""
    start = ablation_of(wildcards).start
    if start.kind == "checkpoint":
        always = {
            "dtype": start.dtype,
            "quantize": None,
            "trust_remote_code": start.trust_remote_code,
            **dated(start.prompt, ablation_of(wildcards).evaluate),
        }
        given = {key: getattr(start, key) for key in ("context_length", "eos_token")}
        return always | {
            key: value for key, value in given.items() if value is not None
        }
    return reading(start.model)


@untracked
def start_placement(wildcards):
    """Return the device placement of that checkpoint, as a rule parameter whose change reruns nothing."""
    start = ablation_of(wildcards).start
    if start.kind == "checkpoint":
        return settings.rerun_policy.execution_settings("models", {"device_map": None})
    return settings.rerun_policy.execution_settings(
        "models", study.models[start.model].model_dump()
    )


def start_facts(wildcards):
    """Return the name, the folder and the prompt format of the checkpoint that an ablation starts from.

    If its arms have a teacher, `teacher` says how that is loaded.
    """
    start = ablation_of(wildcards).start
    taught = study.teacher_of_arms(wildcards.ablation)
    teacher = {} if taught is None else {"teacher": reading(taught)}
    if start.kind == "checkpoint":
        return {
            "name": Path(start.path).name,
            "path": start.path,
            "prompt": start.prompt,
            **teacher,
        }
    name = " ".join(filter(None, (start.model, start.config)))
    return {
        "name": name,
        "path": None,
        "prompt": study.models[start.model].prompt,
        **teacher,
    }


def winner_before(wildcards, stage=None):
    """Return the winner's record of the stage before an arm's or before `stage`; none for the first stage."""
    if stage is None:
        after = arm_of(wildcards).after
    else:
        stages = ablation_of(wildcards).stages
        after = next(each.after for each in stages if each.name == stage)
    return [WINNER.format(ablation=wildcards.ablation, stage=after)] if after else []


def rung_before(wildcards, last=False):
    """Return the record of the arms that survived the rung before this one or, with `last`, the last rung."""
    rung = number_of_rungs(wildcards) if last else int(wildcards.rung) - 1
    return [SURVIVORS.format(ablation=wildcards.ablation, rung=rung)] if rung else []


def of_arms(pattern, wildcards, arms, **more):
    """Return {arm: `pattern` for each of its seeds}."""
    seeds = ablation_of(wildcards).seeds
    return {
        arm: expand(pattern, ablation=wildcards.ablation, arm=arm, seed=seeds, **more)
        for arm in arms
    }


def arms_of(wildcards):
    """Return the arms of the wildcards' stage or, without a stage, of the whole ablation."""
    one, stage = ablation_of(wildcards), wildcards.get("stage")
    return next(
        (each.arms for each in one.stages if each.name == stage),
        list(one.arms),
    )


def arm_records(wildcards):
    return of_arms(f"{ARM}/arm.json", wildcards, arms_of(wildcards))


def rung_records(wildcards):
    return of_arms(RUNG, wildcards, arms_of(wildcards), rung=wildcards.rung)


def ablation_plan(wildcards):
    """Return the settings that all arms share, as a rule parameter."""
    one = ablation_of(wildcards)
    return {
        "base": one.base,
        "budget": one.budget.model_dump(),
        "eval_steps": one.eval_steps,
        "choose_by": one.choose_by.model_dump(),
        "finetune": settings.arms.shared(
            settings.rerun_policy.result_settings("finetune", one.finetune.model_dump())
        ),
        "evaluate": measured(wildcards),
        "training_datasets": files.by_name(study.ablation_datasets(wildcards.ablation)),
        "evaluation_datasets": files.by_name(ablation_datasets(wildcards)),
    }


def measured(wildcards):
    """Return the evaluation settings of the arms, without those that cannot change results."""
    # without the keys of the parts that are switched off, whose change reruns nothing
    given = ablation_of(wildcards).evaluate.model_dump(exclude_unset=True)
    return settings.rerun_policy.result_settings("evaluate", given)


@untracked
def arm_execution(wildcards):
    """Return the execution settings of arms, as a rule parameter whose change reruns nothing.

    `epochs` and `max_steps` are passed here too: they complete the section `finetune`, and the budget overrides them.
    """
    training = ablation_of(wildcards).finetune.model_dump()
    lasting = {key: training[key] for key in settings.arms.LASTING}
    return {
        "finetune": settings.rerun_policy.execution_settings("finetune", training)
        | lasting,
        "evaluate": settings.rerun_policy.execution_settings(
            "evaluate", ablation_of(wildcards).evaluate.model_dump()
        ),
    }


def ablation_datasets(wildcards):
    """Return the names of the texts, tasks and data sets that arms are measured on."""
    return measured_on(ablation_of(wildcards).evaluate)


def asked_by_arm(key):
    """Return a resource function of an arm's job. key: mem_mb, gpu_mem_mb, disk_mb or runtime."""

    def resource(wildcards, attempt):
        on_gpu = computes_on_gpu()
        need = sizes.arm(wildcards.ablation, wildcards.arm, on_gpu)
        return sizes.granted("finetune", need, attempt, on_gpu, largest_gpu())[key]

    return resource
