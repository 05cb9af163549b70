"""Train a LoRA adapter on a checkpoint and write its records: the whole stage, resumable, in one process or several.

The output folder holds the adapter with the tokenizer and a model card, `finetuning_config.json` (settings and facts),
`training_log.txt` (a line every few steps), `training_state.json` (loss history), and beside them, undeclared, the
checkpoints: the newest, and the best one, to which `best` points. A call whose settings and inputs are unchanged by
fingerprint goes on from the newest whole checkpoint, or restores the adapter where the training had ended.
"""

import logging
from contextlib import nullcontext
from pathlib import Path

from .. import data, fingerprints, models, records
from ..errors import CoppiceError, TransientError
from ..settings import effects
from . import all_weights, card, checkpoints, examples, processes, recipe, reuse, sharding
from . import budget as budgets

logger = logging.getLogger("coppice.finetuning")

NOT_LEARNT_FROM = (*effects.HANDLING["finetune"], *effects.BESIDES["finetune"])
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
    twin=None,
    until=None,
    each=False,
    expected=None,
):
    """Fine-tune the checkpoint `source` (a models.Source) by LoRA, or all its weights where `settings` say so.

    identity: {model, config}; datasets: name -> path of the dataset.json of all that `settings` (the section `finetune`
    of the configuration) name; prompt: alpaca | chat | none; output: the folder to write; world: the number of
    processes; twin: the folder of the same training for another config, whose results are taken over; until: a share of
    the training after which it stops, with its validation loss in `reached.json`, and from where a later call goes on;
    each: whether to write the loss of every validation example to `validation_losses.json`; expected: the number of
    parameters that have to be trained, where it is known. Raises CoppiceError for a loss that is not a number, for an
    adapter without effect, and where another number of parameters is trained.
    """
    output = Path(output)
    resolved = settings | {"prompt": prompt}
    if twin:
        settled = ("epochs", "max_steps", "eval_steps") if resolved.get("budget") else ()  # worked out from the budget
        learnt = {name: value for name, value in resolved.items() if name not in (*NOT_LEARNT_FROM, *settled)}
        reuse.take_over(identity, source, twin, output, learnt, seed)
        return
    reuse.leave(output)
    output.mkdir(parents=True, exist_ok=True)
    prints = {"weights": fingerprints.weights(source.path), "tokenizer": fingerprints.tokenizer(source.path)}
    prints["datasets"] = {name: data.facts(record, "train")["fingerprint"] for name, record in datasets.items()}
    key = _key(resolved, prints, seed, source)
    job = {"identity": identity, "source": source, "datasets": datasets, "settings": resolved, "seed": seed}
    _run(
        job | {"output": output, "key": key, "prints": prints, "until": until, "each": each, "expected": expected},
        world,
    )


def _run(job, world):
    """Train; where processes that share the weights run out of memory, all start again from the newest checkpoint."""
    longest = job["settings"]["data"]["cutoff_len"]
    budget = None
    while True:
        resume = checkpoints.to_resume(job["output"], job["key"])
        asked = job["settings"]["micro_batch_size"] * longest
        before = min(asked, checkpoints.facts_of(resume)["budget"]) if resume else asked
        budget = min(budget or before, before)
        try:
            return processes.run(_train, job | {"resume": resume, "budget": budget}, world)
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
    return records.digest([learnt, prints, seed, {name: getattr(source, name) for name in ("dtype", "quantize")}])


def _train(identity, source, datasets, settings, seed, output, key, prints, resume, budget, until, each, expected):
    """The training itself, in each process; the first one writes what comes of it."""
    import transformers

    from . import trainer as trainers

    clock = records.Clock()
    transformers.set_seed(seed)
    tokenizer = models.load_tokenizer(source.path, source.trust_remote_code)
    train, validation, counts = examples.prepare(datasets, settings["data"], settings["prompt"], tokenizer, seed)
    kind = all_weights if settings.get("train") == "all" else recipe
    sharded = kind is recipe and sharding.wanted(settings["sharding"], source, processes.count())
    with sharding.one_after_another() if sharded else nullcontext():
        model = models.load(source, train=True, on="cpu" if sharded else None)
        models.check_vocabulary(model, tokenizer, source.path)
        # a quantised model's weights are packed: their number is not that of its tensors
        base = models.parameters(models.skeleton(source) if source.quantize else model)
        settings = budgets.settled(settings, train, base, seed)
        model = kind.prepare(model, settings, source.quantize, train)
        if sharded:
            sharding.shard(model)
    trainable, total = kind.counts(model)
    logger.info("%s", told(trainable, total))
    if expected is not None and trainable != expected:
        raise CoppiceError(
            f"finetune: trains {trainable} parameters, but its configuration lets expect {expected}: target modules or "
            "biases were not applied as asked"
        )
    before = kind.remember(model, train[0], settings, output)
    dtype = models.dtype_of(source.dtype)
    step = budgets.rung(settings, until) if until else None
    trainer = trainers.build(
        model, dtype, tokenizer, train, validation, settings, output, seed, budget, resume, sharded, kind, step
    )
    if step:
        loss = trainer.run_until(step, resume)
        if processes.is_first():
            records.write(output / REACHED, identity | {"share": until, "step": step, "validation_loss": loss})
        return
    outcome = {"trainable_parameters": trainable, "all_parameters": total, "base_parameters": base}
    outcome |= {"trainable_percent": 100 * trainable / total, **counts}
    done = checkpoints.finished(output, key)
    if done:
        logger.info("the training was finished before: it is restored from %s", done[0].name)
        outcome = done[1]
        trainer.restore(done[0])
    else:
        best, more = trainer.run(resume)
        outcome |= more
        if processes.is_first():
            checkpoints.finish(output, key, best, outcome)
    kind.check_acts(model, train[0], before)
    losses = trainer.example_losses() if each else None
    if not processes.is_first():
        return
    if losses:
        rows = [str(example["row"]) for example in validation]
        records.write(output / EACH, identity | {"rows": rows, "losses": losses[0], "tokens": losses[1]})
    kind.save(model, tokenizer, output, before, source)
    if kind is recipe:
        card.write(output, identity, settings, outcome, source, prints["weights"])
    if settings["merge"]:  # the last use of the adapter's model
        whole = models.load(source, adapter=output, on="cpu") if sharded else model
        models.save(whole.merge_and_unload(), tokenizer, output / "merged")
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    provenance = clock.provenance(settings, seed, **prints)
    _write(output, identity, settings, outcome, history, provenance)


def _write(output, identity, settings, outcome, history, provenance):
    """The records of a training; its warnings go to the log too."""
    records.write(output / "training_state.json", identity | {"history": history, **outcome})
    trained = output / all_weights.MODEL if settings.get("train") == "all" else output
    facts = {"trained_fingerprint": fingerprints.weights(trained), "provenance": provenance}
    records.write(output / "finetuning_config.json", identity | {"settings": settings, **outcome, **facts})
    for warning in outcome["warnings"]:
        logger.warning("%s", warning)


def told(trainable, every):
    """The line in which peft, and every guide to it, says how much is trained."""
    return f"trainable params: {trainable:,} || all params: {every:,} || trainable%: {100 * trainable / every:.4f}"
