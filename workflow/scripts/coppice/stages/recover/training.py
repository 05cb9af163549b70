"""Train a LoRA adapter on a checkpoint and write its records: the whole stage, resumable, in one process or several.

The output folder holds the adapter with the tokenizer and a model card, `finetuning_config.json` (settings and facts),
`training_log.txt` (a line every few steps), `training_state.json` (loss history), and beside them, undeclared, the
checkpoints: the newest, and the best one, to which `best` points. A call whose settings and inputs are unchanged by
fingerprint goes on from the newest whole checkpoint, or restores the adapter where the training had ended.
"""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from coppice import data, models
from coppice.core import fingerprints, records
from coppice.core.errors import CoppiceError, TransientError
from coppice.study.settings import rerun_policy

from . import examples, full, lora, model_card, reuse
from .engine import checkpoints, processes, sharding
from .engine import duration as budgets
from .job import Job, Learner

logger = logging.getLogger("coppice.finetuning")

NOT_LEARNT_FROM = (*rerun_policy.EXECUTION["finetune"], *rerun_policy.EXTRA_OUTPUT["finetune"])
EACH = "validation_losses.json"
REACHED = "reached.json"


def finetune(
    identity,
    source,
    datasets,
    settings,
    prompt,
    output,
    seed=0,
    world=1,
    reused=None,
    until=None,
    each=False,
    expected=None,
):
    """Fine-tune the checkpoint `source` (a models.Source) by LoRA, or all its weights where `settings` say so.

    identity: {model, config}; datasets: name -> path of the dataset.json of all that `settings` (the section `finetune`
    of the configuration) name; prompt: alpaca | chat | none; output: the folder to write; world: the number of
    processes; reused: the folder of the same training for another config, to be copied; until: a share of
    the training after which it stops, with its validation loss in `reached.json`, and from where a later call goes on;
    each: whether to write the loss of every validation example to `validation_losses.json`; expected: the number of
    parameters that have to be trained, where it is known. Raises CoppiceError for a loss that is not a number, for an
    adapter without effect, and where another number of parameters is trained.
    """
    output = Path(output)
    resolved = settings | {"prompt": prompt}
    if reused:
        settled = ("epochs", "max_steps", "eval_steps") if resolved.get("budget") else ()  # worked out from the budget
        learnt = {name: value for name, value in resolved.items() if name not in (*NOT_LEARNT_FROM, *settled)}
        reuse.take_over(identity, source, reused, output, learnt, seed)
        return
    reuse.leave(output)
    output.mkdir(parents=True, exist_ok=True)
    prints = {"weights": fingerprints.weights(source.path), "tokenizer": fingerprints.tokenizer(source.path)}
    prints["datasets"] = {name: data.facts(record, "train")["fingerprint"] for name, record in datasets.items()}
    key = _key(resolved, prints, seed, source)
    _run(Job(identity, source, datasets, resolved, seed, output, key, prints, until, each, expected), world)


def _run(job, world):
    """Train; where processes that share the weights run out of memory, all start again from the newest checkpoint."""
    longest = job.settings["data"]["cutoff_len"]
    budget = None
    while True:
        resume = checkpoints.to_resume(job.output, job.key)
        asked = job.settings["micro_batch_size"] * longest
        fitting = min(asked, checkpoints.facts_of(resume)["budget"]) if resume else asked
        budget = min(budget or fitting, fitting)
        try:
            processes.run(_train, {"job": replace(job, resume=resume, budget=budget)}, world)
            return
        except sharding.OutOfMemory as error:
            if budget < longest:
                raise TransientError(
                    f"finetune: {error}, with {budget} tokens at a time; set finetune.gradient_checkpointing: true, "
                    "lower finetune.data.cutoff_len, or give the job more GPUs (resources_per_job.finetune.gpu)"
                ) from error
            budget //= 2
            logger.warning("%s: the processes start again with %d tokens at a time", error, budget)


def _key(settings, prints, seed, source):
    """A digest of all that decides what is learnt; what only decides what is written about it is left out."""
    learnt = {name: value for name, value in settings.items() if name not in NOT_LEARNT_FROM}
    learnt["lora"] = {name: value for name, value in settings["lora"].items() if name != "preset"}
    if source.trust_remote_code:
        learnt["code"] = fingerprints.code(source.path)
    return records.digest([learnt, prints, seed, {name: getattr(source, name) for name in ("dtype", "quantize")}])


def _train(job):
    """The training itself, in each process; the first one writes what comes of it."""
    import transformers

    from .engine import trainer as trainers

    clock = records.Clock()
    transformers.set_seed(job.seed)
    tokenizer = models.load_tokenizer(job.source.path, job.source.trust_remote_code)
    train, validation, counts = examples.prepare(
        job.datasets, job.settings["data"], job.settings["prompt"], tokenizer, job.seed
    )
    learner = _learner(job, tokenizer, train)
    before = learner.kind.remember(learner.model, train[0], learner.settings, job.output)
    trainer = trainers.build(job, learner, tokenizer, train, validation)
    if job.until:
        _stop_at_rung(job, learner, trainer)
        return
    outcome = _trained(job, trainer, learner.counts | counts)
    learner.kind.check_acts(learner.model, train[0], before)
    losses = trainer.example_losses() if job.each else None
    if not processes.is_first():
        return
    if losses:
        rows = [str(example["row"]) for example in validation]
        records.write(job.output / EACH, job.identity | {"rows": rows, "losses": losses[0], "tokens": losses[1]})
    _save(job, learner, tokenizer, before, outcome)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    _write(job, learner.settings, outcome, history, clock.provenance(learner.settings, job.seed, **job.prints))


def _learner(job, tokenizer, train):
    """The model with what is trained of it; CoppiceError where that is not as many parameters as expected."""
    source = job.source
    kind = full if job.settings.get("train") == "all" else lora
    sharded = kind is lora and sharding.wanted(job.settings["sharding"], source, processes.count())
    with sharding.one_after_another() if sharded else nullcontext():
        model = models.load(source, train=True, on="cpu" if sharded else None)
        models.check_vocabulary(model, tokenizer, source.path)
        # a quantised model's weights are packed: their number is not that of its tensors
        base = models.parameters(models.skeleton(source) if source.quantize else model)
        settings = budgets.settled(job.settings, train, base, job.seed)
        model = kind.prepare(model, settings, source.quantize, train)
        if sharded:
            sharding.shard(model)
    trainable, total = kind.counts(model)
    logger.info("%s", trainable_share(trainable, total))
    if job.expected is not None and trainable != job.expected:
        raise CoppiceError(
            f"finetune: trains {trainable} parameters, but its configuration lets expect {job.expected}: target "
            "modules or biases were not applied as asked"
        )
    counts = {"trainable_parameters": trainable, "all_parameters": total, "base_parameters": base}
    counts["trainable_percent"] = 100 * trainable / total
    return Learner(model, kind, settings, sharded, counts)


def _stop_at_rung(job, learner, trainer):
    """Train up to the share `job.until`, and write the validation loss there."""
    step = budgets.rung(learner.settings, job.until)
    loss = trainer.run_until(step, job.resume)
    if processes.is_first():
        records.write(job.output / REACHED, job.identity | {"share": job.until, "step": step, "validation_loss": loss})


def _trained(job, trainer, facts):
    """Train to the end, or restore what a training that had ended has left; returns `facts` with those of it."""
    done = checkpoints.finished(job.output, job.key)
    if done:
        logger.info("the training was finished before: it is restored from %s", done[0].name)
        trainer.restore(done[0])
        return done[1]
    best, more = trainer.run(job.resume)
    outcome = facts | more
    if processes.is_first():
        checkpoints.finish(job.output, job.key, best, outcome)
    return outcome


def _save(job, learner, tokenizer, before, outcome):
    """Write what was trained; the adapter's model is used up where `merge` is asked for."""
    learner.kind.save(learner.model, tokenizer, job.output, before, job.source)
    if learner.kind is lora:
        model_card.write(job.output, job.identity, learner.settings, outcome, job.source, job.prints["weights"])
    if learner.settings["merge"]:
        whole = models.load(job.source, adapter=job.output, on="cpu") if learner.sharded else learner.model
        models.save(whole.merge_and_unload(), tokenizer, job.output / "merged")


def _write(job, settings, outcome, history, provenance):
    """The records of a training; its warnings go to the log too."""
    records.write(job.output / "training_state.json", job.identity | {"history": history, **outcome})
    trained = job.output / full.MODEL if settings.get("train") == "all" else job.output
    facts = {"trained_fingerprint": fingerprints.weights(trained), "provenance": provenance}
    records.write(job.output / "finetuning_config.json", job.identity | {"settings": settings, **outcome, **facts})
    for warning in outcome["warnings"]:
        logger.warning("%s", warning)


def trainable_share(trainable, every):
    """The line in which peft, and every guide to it, says how much is trained."""
    return f"trainable params: {trainable:,} || all params: {every:,} || trainable%: {100 * trainable / every:.4f}"
