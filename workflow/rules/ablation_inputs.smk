"""What the rules of ablations share: where arms, winners and rungs lie, and which of them each job rests on.

Takes the study's ablations as `settings` resolved them; gives the patterns and input functions of `ablation.smk`.
"""

from coppice.ablation import figures as ablation_figures

ABLATION = f"{RESULTS}/ablation/{{ablation}}"
ARM = f"{ABLATION}/{{arm}}/seed-{{seed}}"
WINNER = f"{ABLATION}/winner-{{stage}}.json"
REACHED = f"{ARM}/rung-{{rung}}.json"
CUT = f"{ABLATION}/rung-{{rung}}.json"


wildcard_constraints:
    ablation="|".join(map(re.escape, study.ablations)) or "(?!)",
    arm="|".join(
        {re.escape(arm) for one in study.ablations.values() for arm in one["arms"]}
    )
    or "(?!)",
    seed=r"\d+",
    stage=r"[A-Za-z0-9][A-Za-z0-9._+-]*",
    rung=r"\d+",


def ablated(wildcards):
    return study.ablations[wildcards.ablation]


def start_inputs(wildcards):
    """The records, or the user's files, that the start of an ablation rests on."""
    start = ablated(wildcards)["start"]
    if start["kind"] == "checkpoint":
        return {"checkpoint": layout.local_files(start | {"kind": "local"})}
    dense = {"dense": files.model(start["model"])}
    if start["kind"] == "dense":
        return dense
    chosen = SELECTION.format(model=start["model"], config=start["config"])
    return dense | {"selection": chosen}


def start_loading(wildcards):
    """How the start of an ablation is loaded, as a rule parameter."""
    start = ablated(wildcards)["start"]
    if start["kind"] == "checkpoint":
        return {
            "dtype": start["dtype"],
            "quantize": None,
            "trust_remote_code": start["trust_remote_code"],
        }
    return loading(start["model"])


def start_placement(wildcards, output):
    """As `placement`, of the model that an ablation starts from."""
    start = ablated(wildcards)["start"]
    entry = {} if start["kind"] == "checkpoint" else study.models[start["model"]]
    return settings.rerun_policy.execution_settings(
        "models", {"device_map": None} | entry
    )


def start_facts(wildcards):
    start = ablated(wildcards)["start"]
    if start["kind"] == "checkpoint":
        return {
            "name": Path(start["path"]).name,
            "path": start["path"],
            "prompt": start["prompt"],
        }
    name = " ".join(filter(None, (start["model"], start["config"])))
    return {
        "name": name,
        "path": None,
        "prompt": study.models[start["model"]]["prompt"],
    }


def winner_before(wildcards, stage=None):
    """The record of the stage whose winner an arm or stage goes on from; none at the first."""
    one = ablated(wildcards)
    if stage is None:
        after = one["arms"][wildcards.arm]["after"]
    else:
        after = next(each["after"] for each in one["stages"] if each["name"] == stage)
    return [WINNER.format(ablation=wildcards.ablation, stage=after)] if after else []


def rung_before(wildcards, last=False):
    """The record of who is still in: after the last rung, or after the one before."""
    racing = ablated(wildcards)["racing"]
    rung = (len(racing["rungs"]) if racing else 0) if last else int(wildcards.rung) - 1
    return [CUT.format(ablation=wildcards.ablation, rung=rung)] if rung else []


def of_arms(pattern, wildcards, arms, **more):
    """arm -> `pattern` for each of its seeds."""
    seeds = ablated(wildcards)["seeds"]
    return {
        arm: expand(pattern, ablation=wildcards.ablation, arm=arm, seed=seeds, **more)
        for arm in arms
    }


def arms_of(wildcards):
    """The arms of a stage where there is one, else of the whole ablation."""
    one, stage = ablated(wildcards), wildcards.get("stage")
    return next(
        (each["arms"] for each in one["stages"] if each["name"] == stage),
        list(one["arms"]),
    )


def arm_records(wildcards):
    return of_arms(f"{ARM}/arm.json", wildcards, arms_of(wildcards))


def rung_records(wildcards):
    return of_arms(REACHED, wildcards, arms_of(wildcards), rung=wildcards.rung)


def ablation_plan(wildcards):
    """What all arms have in common, as a rule parameter."""
    one = ablated(wildcards)
    plan = {key: one[key] for key in ("base", "budget", "eval_steps", "choose_by")}
    return plan | {
        "finetune": settings.arms.shared(
            settings.rerun_policy.result_settings("finetune", one["finetune"])
        ),
        "evaluate": measured(wildcards),
        "training_datasets": files.by_name(study.training_datasets(one["finetune"])),
        "evaluation_datasets": files.by_name(ablation_datasets(wildcards)),
    }


def measured(wildcards):
    """How arms are measured, without what decides no number."""
    return settings.rerun_policy.result_settings(
        "evaluate", ablated(wildcards)["evaluate"]
    )


def arm_handling(wildcards, output):
    """How arms are trained and measured, as a rule parameter whose change reruns nothing."""
    training = ablated(wildcards)["finetune"]
    lasting = {key: training[key] for key in settings.arms.LASTING}
    return {
        "finetune": settings.rerun_policy.execution_settings("finetune", training)
        | lasting,
        "evaluate": settings.rerun_policy.execution_settings(
            "evaluate", study.evaluate
        ),
    }


def ablation_datasets(wildcards):
    """Names of the texts and tasks that arms are measured on."""
    measured = ablated(wildcards)["evaluate"]
    return list(
        dict.fromkeys(
            [*measured["perplexity"]["datasets"], *measured["zero_shot"]["tasks"]]
        )
    )


def asked_by_arm(key):
    """What an arm asks for of `mem_mb`, `gpu_mem_mb`, `disk_mb` or `runtime`."""

    def resource(wildcards, attempt):
        on_gpu = computes_on_gpu()
        need = sizes.arm(wildcards.ablation, wildcards.arm, on_gpu)
        return sizes.granted("finetune", need, attempt, on_gpu, largest_gpu())[key]

    return resource
