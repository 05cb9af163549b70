"""Fine-tune a checkpoint and write the records: the whole stage, resumable, in one process or several.

The output folder holds the adapter with its tokenizer and model card (or the trained model), `finetuning_config.json`
(settings and results), `training_log.txt` (a line every few steps) and `training_state.json` (loss history). The
checkpoints lie beside them: the newest one, and the best one, to which `best` points. They are not outputs of the rule,
because Snakemake deletes outputs before a rerun. If settings and inputs have not changed, a rerun continues from the
newest complete checkpoint, or restores the result of a training that had finished.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from coppice import data, models
from coppice.core import fingerprints, records
from coppice.core.aliases import Record
from coppice.core.errors import CoppiceError, SettingsError, TransientError
from coppice.models import chat_clock, sparsity
from coppice.models.kinds import Example, ModelKind
from coppice.study.settings import rerun_policy

from . import distillation, examples, model_card, tower_adapters, zeros
from .engine import best_by, checkpoints, duration, processes, sharding
from .job import EXAMPLE_LOSSES_FILE, RUNG_LOSS_FILE, Job, Learner
from .recoveries import recovery_of
from .training_request import TrainingRequest

if TYPE_CHECKING:
    from .engine.best_by import Asking
    from .engine.trainer import StepTrainer

logger = logging.getLogger("coppice.finetuning")

# settings that only change how a training is computed or what else it writes: two trainings may differ in them
UNCOMPARED = (*rerun_policy.EXECUTION["finetune"], *rerun_policy.EXTRA_OUTPUT["finetune"])


def finetune(request: TrainingRequest) -> None:
    """Fine-tune a checkpoint by the recovery that the settings of `request` name.

    Raises:
        CoppiceError: The loss is not a finite number, training had no effect, or the number of trainable parameters
            differs from the expected one.
    """
    source, settings = request.source, request.settings
    request.output.mkdir(parents=True, exist_ok=True)
    prints: Record = {"weights": fingerprints.weights(source.path), "tokenizer": fingerprints.tokenizer(source.path)}
    sets = request.datasets.items()
    prints |= distillation.prints_of(request, prints["weights"])
    prints["datasets"] = {name: data.facts(record, "train")["fingerprint"] for name, record in sets}
    learned = settings.recorded(request.prompt)
    if recovery_of(settings).trained.adapter:
        learned.pop("keep_sparsity", None)  # an adapter is trained in the same way, whatever is merged later
    key = _key(learned, prints, request)
    _run(Job(request, settings, key, prints))


def _run(job: Job) -> None:
    """Train; if processes that share the weights run out of memory, restart all of them with half the token limit."""
    longest = job.settings.data.cutoff_len
    limit = None
    while True:
        resume = checkpoints.to_resume(job.request.output, job.key)
        asked = job.settings.micro_batch_size * longest
        # a checkpoint records the limit that fitted in memory, so that a resumed training does not run out again
        fitting = min(asked, checkpoints.facts_of(resume)["budget"]) if resume else asked
        limit = min(limit or fitting, fitting)
        try:
            processes.run(_train, {"job": replace(job, resume=resume, token_limit=limit)}, job.request.world)
            return
        except sharding.OutOfMemory as error:
            if limit < longest:  # the longest example runs alone already, so halving cannot help
                raise TransientError(
                    f"finetune: {error}, with {limit} tokens at a time. Set finetune.gradient_checkpointing: true, "
                    "lower finetune.data.cutoff_len, or give the job more GPUs (resources_per_job.finetune.gpu)."
                ) from error
            limit //= 2
            logger.warning("%s: the processes start again with %d tokens at a time", error, limit)


def _key(settings: Record, prints: Record, request: TrainingRequest) -> str:
    """Return a digest of everything that affects what is learned; settings that only affect the output are left out."""
    source = request.source
    compared = {name: value for name, value in settings.items() if name not in UNCOMPARED}
    # the preset is resolved already: the same adapter has the same key, whether a preset named it or not
    compared["lora"] = {name: value for name, value in settings["lora"].items() if name != "preset"}
    if source.trust_remote_code:
        compared["code"] = fingerprints.code(source.path)  # the model's own code computes the numbers
    compared |= chat_clock.recorded(source)
    loading = _precision(source)
    if "teacher" in prints:  # another precision makes another teacher
        loading["teacher"] = _precision(request.teacher)
    loading |= {"eos_token": source.eos_token} if source.eos_token is not None else {}
    return records.digest([compared, prints, request.seed, loading])


def _precision(source: models.Source) -> Record:
    return {name: getattr(source, name) for name in ("dtype", "quantize")}


def _train(job: Job) -> None:
    """Train, in each of the processes; the first one writes the results."""
    import transformers

    from .engine import trainer as trainers

    clock, request = records.Clock(), job.request
    transformers.set_seed(request.seed)
    reader = request.source.reader()
    kind = models.kind_of(request.source)
    train, validation, counts = examples.prepare(
        request.datasets, job.settings.data, request.prompt, reader, request.seed, kind
    )
    learner = _learner(job, kind, reader, train)
    trained = learner.recovery.trained
    before = trained.before_training(learner.model, kind, train[0], learner.settings, request.output)
    trainer = trainers.build(job, learner, reader, train, validation, _asking(job, kind, reader, validation))
    if request.stop_share:
        _stop_at_rung(job, learner, trainer)
        return
    outcome = _trained(job, trainer, learner.counts | counts)
    trained.check_acts(learner.model, kind, train[0], before)
    losses = trainer.example_losses() if request.example_losses else None
    if not processes.is_first():
        return
    if losses:
        rows = [str(example["row"]) for example in validation]
        facts = {"rows": rows, "losses": losses[0], "tokens": losses[1]}
        records.write(request.output / EXAMPLE_LOSSES_FILE, request.identity | facts)
    outcome = _save(job, learner, reader, before, outcome, (validation or train)[: zeros.EXAMPLES])
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    settings = learner.settings.recorded(request.prompt)
    _write(job, learner, outcome, history, clock.provenance(settings, request.seed, **job.prints))


def _asking(job: Job, kind: ModelKind, reader: models.Reader, validation: Sequence[Example] | None) -> Asking | None:
    """Return what measures the metric that the best checkpoint is chosen by; None for the validation loss."""
    settings, request = job.settings, job.request
    if settings.best_by is None:
        return None
    if settings.best_by not in kind.validators or not validation:
        offers = ", ".join(["null (the validation loss)", *kind.validators])
        obstacle = f"{kind.noun} offers {offers}" if validation else "no row is held out (finetune.data.val_size)"
        raise SettingsError(f"finetune.best_by: is {settings.best_by}, but {obstacle}. Set it to null.")
    rows = examples.to_ask(request.datasets, settings.data, request.prompt, reader, request.seed, kind)
    return best_by.asking(settings.best_by, kind, reader, rows, validation)


def _learner(job: Job, kind: ModelKind, reader: models.Reader, train: Sequence[Example]) -> Learner:
    """Return the Learner: the model, made trainable. Raise CoppiceError if the parameter count is not as expected."""
    source, trained, objective = job.request.source, recovery_of(job.settings).trained, job.settings.objective
    sharded = trained.adapter and sharding.wanted(job.settings.sharding, source, processes.count())
    if sharded and kind.coupled:
        raise SettingsError(
            f"finetune.sharding: the processes that train {kind.noun} exchange embeddings, and cannot also share "
            "weights. Set it to false."
        )
    with sharding.one_after_another() if sharded else nullcontext():
        model = models.load(source, train=True, on="cpu" if sharded else None)
        models.check_vocabulary(model, reader.tokenizer, source.path)
        teacher = None
        if objective.kl:
            teacher = distillation.load(job.request.teacher, kind, job.settings, job.token_limit)
        recovery = recovery_of(job.settings, teacher)
        base, start = models.parameters(model), sparsity.measure(model)
        zeros.check(start, job.settings, trained.adapter)
        lengths, per_token = [kind.length(example) for example in train], recovery.operations(base)
        settings = duration.resolved(job.settings, lengths, per_token, job.request.seed)
        model = trained.prepare(model, kind, source, settings, train)
        if sharded:
            sharding.shard(model)
    trainable, total = trained.counts(model)
    logger.info("%s", trainable_share(trainable, total))
    if job.request.expected is not None and trainable != job.request.expected:
        raise CoppiceError(
            f"finetune: {trainable} parameters are trainable, but the configuration implies {job.request.expected}. "
            "Check target_modules and bias under finetune.lora."
        )
    counts: Record = {"trainable_parameters": trainable, "all_parameters": total, "base_parameters": base}
    counts["trainable_percent"] = 100 * trainable / total
    if teacher:
        counts["teacher"] = {"weights": job.prints["teacher"], "parameters": teacher.parameters}
    if len(kind.tower_names) > 1:
        counts["trainable_by_tower"] = tower_adapters.trainable(model, kind)
    return Learner(model, kind, recovery, settings, sharded, counts, start)


def _stop_at_rung(job: Job, learner: Learner, trainer: StepTrainer) -> None:
    """Train up to the fraction `job.request.stop_share`, and write the validation loss there."""
    step = duration.rung(learner.settings, job.request.stop_share)
    loss = trainer.run_until(step, job.resume)
    if processes.is_first():
        facts = {"share": job.request.stop_share, "step": step, "validation_loss": loss}
        records.write(job.request.output / RUNG_LOSS_FILE, job.request.identity | facts)


def _trained(job: Job, trainer: StepTrainer, facts: Record) -> Record:
    """Train to the end, or restore a training that had finished; return `facts` and those about the training."""
    done = checkpoints.finished(job.request.output, job.key)
    if done:
        logger.info("this training has finished already; restoring its result from %s", done[0].name)
        trainer.restore(done[0])
        return done[1]
    before = trainer.reported_losses()
    best, more = trainer.run(job.resume)
    outcome = facts | more
    if "teacher" in facts:
        cost = {"operations": trainer.recovery.objective.operations * more["tokens_seen"]}
        outcome["teacher"] = facts["teacher"] | cost
    after = trainer.reported_losses() if before else {}
    outcome |= {name: {"before": loss, "after": after[name]} for name, loss in before.items()}
    if processes.is_first():
        checkpoints.finish(job.request.output, job.key, best, outcome)
    return outcome


def _save(
    job: Job,
    learner: Learner,
    reader: models.Reader,
    before: object,
    outcome: Record,
    examples: list[Example],
) -> Record:
    """Write the trained adapter or model, and with `merge` the merged checkpoint.

    Returns `outcome` with the facts about zeros, which are measured on `examples`.
    """
    trained, request = learner.recovery.trained, job.request
    trained.save(learner.model, reader, request.output, before, request.source)
    found = _kept(job, learner, reader, examples, outcome["tokens_at_a_time"])
    outcome = outcome | {"sparsity": found, "warnings": [*outcome["warnings"], *zeros.warnings(found)]}
    if trained.adapter:
        model_card.write(request, learner.settings, outcome, job.prints["weights"])
    return outcome


def _kept(
    job: Job, learner: Learner, reader: models.Reader, examples: list[Example], token_limit: int
) -> Record | None:
    """Merge the adapter if that is asked for, and return what became of the zeros of a sparse checkpoint.

    Returns:
        {mode, adapter, before, after, mask_loss}; None for a quantized checkpoint. `after` is the trained or merged
        model, and None if the adapter stays beside the weights and was not merged to look. mask_loss: {adapter,
        masked}, the mean losses with the adapter beside the weights and merged with the zeros kept.
    """
    settings, start, adapter = learner.settings, learner.zeros, learner.recovery.trained.adapter
    sparse, mode = sparsity.is_sparse(start), settings.keep_sparsity
    facts = {"mode": mode, "adapter": adapter, "before": start, "after": None, "mask_loss": None}
    if not adapter:
        return facts | {"after": sparsity.measure(learner.model)}
    # A sharded process holds only a part of the base weights, and some initializations (PiSSA) took the adapter out of
    # the base: then the model is loaded again, but only if a merged checkpoint is asked for.
    whole, losses = learner.model, None
    again = learner.sharded or (sparse and sparsity.measure(whole) != start)
    looks = sparse and mode != zeros.REFUSED and not again
    if not (settings.merge or looks):
        return facts if start else None
    if again:
        # not with `models.load` alone: the record that it compares with is not written yet
        whole = models.load_adapter(models.load(job.request.source, on="cpu"), job.request.output)
    elif looks and mode == zeros.MASK:
        losses = {"adapter": zeros.mean_loss(whole, learner.kind, examples, token_limit)}
    merged = sparsity.merge(whole, keep_zeros=mode == zeros.MASK)
    if losses:
        losses["masked"] = zeros.mean_loss(merged, learner.kind, examples, token_limit)
    after = sparsity.measure(merged)
    if settings.merge:
        folder = zeros.merged_folder(job.request.output, start, settings)
        sparsity.check_name(folder, start, after)
        models.save(merged, reader, folder)
    return facts | {"after": after, "mask_loss": losses} if start else None


def _write(job: Job, learner: Learner, outcome: Record, history: list[Record], provenance: Record) -> None:
    """Write the records of a training, and its warnings to the log."""
    output, identity = job.request.output, job.request.identity
    records.write(output / "training_state.json", identity | {"history": history, **outcome})
    facts = {"settings": learner.settings.recorded(job.request.prompt), **outcome}
    facts |= chat_clock.recorded(job.request.source)
    facts["trained_fingerprint"] = fingerprints.weights(learner.recovery.trained.folder(output))
    records.write(output / "finetuning_config.json", identity | facts | {"provenance": provenance})
    for warning in outcome["warnings"]:
        logger.warning("%s", warning)


def trainable_share(trainable: int, every: int) -> str:
    """Return the line that peft prints about trainable parameters, in the same format."""
    return f"trainable params: {trainable:,} || all params: {every:,} || trainable%: {100 * trainable / every:.4f}"
