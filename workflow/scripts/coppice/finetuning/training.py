"""Train a LoRA adapter on a checkpoint with `transformers.Trainer` and `peft`, resumable, and write its records.

The output folder holds the adapter, the tokenizer, `finetuning_config.json` (settings and facts),
`training_log.txt` (a line every few steps), `training_state.json` (loss history) and `checkpoint-*`. A run whose
settings and inputs are unchanged by fingerprint continues from the newest checkpoint; checkpoints of other settings
are moved aside.
"""

import json
import logging
import math
import shutil
from pathlib import Path

from .. import data, fingerprints, models, records
from ..errors import CoppiceError
from . import examples, recipe
from .progress import TrainingLog

logger = logging.getLogger("coppice.finetuning")

KEY = ".training_key.json"


def finetune(identity, source, dataset, settings, prompt, output, seed=0):
    """Fine-tune the checkpoint `source` (a models.Source) by LoRA on the prepared dataset record `dataset`.

    identity: {model, config}; settings: the `finetune` part of the configuration; prompt: alpaca | chat | none;
    output: the folder to write. Raises CoppiceError for a loss that is not a number and for an adapter without effect.
    """
    clock = records.Clock()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    facts = data.facts(dataset, "train")
    resolved = settings | {"prompt": prompt}
    prints = {"weights": fingerprints.weights(source.path), "dataset": facts["fingerprint"]}
    resume = _checkpoint_to_resume(output, records.digest([resolved, prints, seed]))

    import transformers

    transformers.set_seed(seed)
    tokenizer = models.load_tokenizer(source.path, source.trust_remote_code)
    model = models.load(source, train=True)
    models.check_vocabulary(model, tokenizer, source.path)
    rows = data.load(dataset, "train")
    formatter = examples.Formatter(prompt, tokenizer)
    train, validation, counts = examples.prepare(rows, formatter, tokenizer, settings["data"], seed)
    model = _with_lora(model, settings["lora"])
    trainable, total = model.get_nb_trainable_parameters()
    logger.info(
        "trainable params: %s || all params: %s || trainable%%: %.4f", trainable, total, 100 * trainable / total
    )
    trainer = _trainer(model, tokenizer, train, validation, resolved, output, seed)
    result = _train(trainer, resume)
    _check_acts(model, train[0])
    _save(model, tokenizer, output)
    if settings["merge"]:
        _merge(model, tokenizer, output / "merged")
    seen = trainer.state.num_input_tokens_seen
    seconds = result.metrics.get("train_runtime", 0.0)
    outcome = {
        "trainable_parameters": trainable,
        "all_parameters": total,
        "trainable_percent": 100 * trainable / total,
        "steps": trainer.state.global_step,
        "tokens_seen": int(seen),
        "tokens_per_second": seen / seconds if seconds else None,
        "seconds": seconds,
        "train_loss": result.training_loss,
        **_validation_losses(trainer.state.log_history),
        **counts,
    }
    records.write(output / "training_state.json", identity | {"history": trainer.state.log_history, **outcome})
    provenance = clock.provenance(resolved, seed, **prints)
    records.write(
        output / "finetuning_config.json", identity | {"settings": resolved, **outcome, "provenance": provenance}
    )


def _with_lora(model, lora):
    from peft import get_peft_model

    return get_peft_model(model, recipe.lora_config(model, lora))


def _trainer(model, tokenizer, train, validation, settings, output, seed):
    """A Trainer over the padded examples, with the settings of the configuration."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    micro = min(settings["micro_batch_size"], settings["batch_size"])
    bf16 = next(model.parameters()).dtype.itemsize == 2 and models.device().type == "cuda"
    evaluates = validation is not None
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=4 * micro,
        gradient_accumulation_steps=math.ceil(settings["batch_size"] / micro),
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"] or -1,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        weight_decay=settings["weight_decay"],
        warmup_steps=settings["warmup_steps"],
        logging_steps=min(10, settings["eval_steps"]),
        logging_nan_inf_filter=False,  # the filter would show the last good loss in place of NaN
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings["eval_steps"],
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings["save_steps"],
        save_total_limit=2,  # the best and the newest
        load_best_model_at_end=evaluates,
        metric_for_best_model="eval_loss" if evaluates else None,
        include_num_input_tokens_seen="non_padding",
        bf16=bf16,
        use_cpu=models.device().type == "cpu",
        dataloader_pin_memory=models.device().type == "cuda",
        report_to=settings["report_to"] or "none",
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[TrainingLog(output / "training_log.txt")],
    )
    trainer.remove_callback(_printer())
    return trainer


def _printer():
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _checkpoint_to_resume(output, key):
    """The newest complete checkpoint of the same settings and inputs, or None; others are moved aside."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=_step)
    marker = output / KEY
    try:
        known = json.loads(marker.read_text())["key"]
    except (OSError, ValueError, KeyError):
        known = None
    if known != key:
        if checkpoints:
            aside = output / f"superseded-{(known or 'unknown')[:8]}"
            logger.warning("%d checkpoints of other settings are moved to %s", len(checkpoints), aside)
            aside.mkdir(exist_ok=True)
            for folder in checkpoints:
                shutil.rmtree(aside / folder.name, ignore_errors=True)
                folder.rename(aside / folder.name)
        with records.atomic(marker) as file:
            json.dump({"key": key}, file)
        return None
    complete = [folder for folder in checkpoints if (folder / "trainer_state.json").is_file()]
    if complete:
        logger.info("continuing from %s", complete[-1].name)
    return str(complete[-1]) if complete else None


def _step(folder):
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _train(trainer, resume):
    """Run the training; a loss that is not finite ends it with the step and advice."""
    result = trainer.train(resume_from_checkpoint=resume)
    if not math.isfinite(result.training_loss):
        raise CoppiceError("finetune: the training loss is not finite; lower finetune.learning_rate")
    return result


def _check_acts(model, example):
    """Refuse an adapter that changes no logit of an example it was trained on."""
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([example["input_ids"]], device=device)
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            plain = model(input_ids=ids, use_cache=False).logits
    if torch.equal(adapted, plain):
        raise CoppiceError("finetune: the trained adapter changes no logit; check finetune.lora and the learning rate")


def _save(model, tokenizer, output):
    """Write the adapter and the tokenizer; the adapter's files replace older ones only when they are whole."""
    partial = output / ".partial-adapter"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in sorted(partial.iterdir()):
        file.replace(output / file.name)
    partial.rmdir()


def _merge(model, tokenizer, folder):
    """Write the model with the adapter merged into its weights, as an ordinary checkpoint."""
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _validation_losses(history):
    losses = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry]
    if not losses:
        return {"validation_loss": None, "best_step": None, "first_validation_loss": None}
    best, step = min(losses)
    if best >= losses[0][0] and len(losses) > 1:
        logger.warning("the validation loss never fell below its first value, %.4f", losses[0][0])
    return {"validation_loss": best, "best_step": step, "first_validation_loss": losses[0][0]}
