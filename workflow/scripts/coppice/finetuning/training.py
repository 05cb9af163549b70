"""Train a LoRA adapter on a checkpoint and write its records: the whole stage, resumable, in one process or several.

The output folder holds the adapter with the tokenizer and a model card, `finetuning_config.json` (settings and facts),
`training_log.txt` (a line every few steps), `training_state.json` (loss history), and beside them, undeclared, the
checkpoints: the newest, and the best one, to which `best` points. A call whose settings and inputs are unchanged by
fingerprint goes on from the newest whole checkpoint, or restores the adapter where the training had ended.
"""

import logging
from pathlib import Path

from .. import data, fingerprints, models, records
from . import card, checkpoints, examples, processes, recipe

logger = logging.getLogger("coppice.finetuning")

NOT_LEARNT_FROM = ("merge", "report_to", "seeds", "save_steps")


def finetune(identity, source, datasets, settings, prompt, output, seed=0, world=1):
    """Fine-tune the checkpoint `source` (a models.Source) by LoRA.

    identity: {model, config}; datasets: name -> path of the dataset.json of all that `settings` (the section `finetune`
    of the configuration) name; prompt: alpaca | chat | none; output: the folder to write; world: the number of
    processes. Raises CoppiceError for a loss that is not a number and for an adapter without effect.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    resolved = settings | {"prompt": prompt}
    prints = {"weights": fingerprints.weights(source.path), "tokenizer": fingerprints.tokenizer(source.path)}
    prints["datasets"] = {name: data.facts(record, "train")["fingerprint"] for name, record in datasets.items()}
    key = _key(resolved, prints, seed, source)
    resume = checkpoints.to_resume(output, key)
    job = {"identity": identity, "source": source, "datasets": datasets, "settings": resolved, "seed": seed}
    job |= {"output": output, "key": key, "prints": prints, "resume": resume}
    processes.run(_train, job, world)


def _key(settings, prints, seed, source):
    """A digest of all that decides what is learnt; what only decides what is written about it is left out."""
    learnt = {name: value for name, value in settings.items() if name not in NOT_LEARNT_FROM}
    learnt["lora"] = {name: value for name, value in settings["lora"].items() if name != "preset"}
    return records.digest([learnt, prints, seed, {name: getattr(source, name) for name in ("dtype", "quantize")}])


def _train(identity, source, datasets, settings, seed, output, key, prints, resume):
    """The training itself, in each process; the first one writes what comes of it."""
    import transformers

    from . import trainer as trainers

    clock = records.Clock()
    transformers.set_seed(seed)
    tokenizer = models.load_tokenizer(source.path, source.trust_remote_code)
    model = models.load(source, train=True)
    models.check_vocabulary(model, tokenizer, source.path)
    train, validation, counts = examples.prepare(datasets, settings["data"], settings["prompt"], tokenizer, seed)
    model = recipe.with_lora(model, settings, source.quantize, train)
    trainable, total = model.get_nb_trainable_parameters()
    logger.info(
        "trainable params: %s || all params: %s || trainable%%: %.4f", trainable, total, 100 * trainable / total
    )
    initial = recipe.keep_initial(model, settings["lora"], output)
    dtype = models.dtype_of(source.dtype)
    trainer = trainers.build(model, dtype, tokenizer, train, validation, settings, output, seed, resume)
    outcome = {"trainable_parameters": trainable, "all_parameters": total}
    outcome |= {"trainable_percent": 100 * trainable / total, **counts}
    done = checkpoints.finished(output, key)
    if done:
        logger.info("the training was finished before: the adapter is restored from %s", done[0].name)
        outcome = done[1]
        trainer.restore(done[0])
    else:
        best, more = trainer.run(resume)
        outcome |= more
        if processes.is_first():
            checkpoints.finish(output, key, best, outcome)
    if not processes.is_first():
        return
    recipe.check_acts(model, train[0], initial)
    recipe.save(model, tokenizer, output, initial)
    card.write(output, identity, settings, outcome, source, prints["weights"])
    if settings["merge"]:  # the last use of the adapter's model
        models.save(model.merge_and_unload(), tokenizer, output / "merged")
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    records.write(output / "training_state.json", identity | {"history": history, **outcome})
    provenance = clock.provenance(settings, seed, **prints)
    records.write(
        output / "finetuning_config.json", identity | {"settings": settings, **outcome, "provenance": provenance}
    )
    for warning in outcome["warnings"]:
        logger.warning("%s", warning)
