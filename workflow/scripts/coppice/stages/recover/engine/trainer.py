"""`transformers.Trainer` with a step of our own: whole optimizer steps as batches, arranged without waste.

The loader yields the examples of one optimizer step at a time, in an order that depends on seed and epoch alone, so a
resumed training sees what an undisturbed one would. In several processes each takes its share of a step's
examples, and the gradients are summed before the optimizer's step: the same step as in one process.
"""

import functools
import logging
import math
import os
import time
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import distributed
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from coppice import models
from coppice.core import records
from coppice.core.errors import CoppiceError, SettingsError, Stopped, TransientError

from . import checkpoints, duration, processes, progress, sharding
from .batching import Engine, count_targets
from .loader import StepLoader, StepSampler, together
from .progress import Patience, StopAt, StopOnSignal, TrainingLog

logger = logging.getLogger("coppice.finetuning")

VALIDATION_ROWS = 256  # examples that are arranged together


def build(job, learner, tokenizer, train, validation):
    """A StepTrainer for what a `Learner` trains, on examples, with the settings of the section `finetune`.

    It stops at `job.until`, a share of the training, where that is given.
    """
    settings, resume = learner.settings, job.resume
    before = checkpoints.facts_of(resume) if resume else {}
    engine = Engine(learner.model, job.budget, settings["arrangement"])
    log = TrainingLog(job.output / "training_log.txt", settings["batch_size"], before.get("seconds", 0.0))
    patience = Patience(settings["early_stopping"]) if settings["early_stopping"] and validation else None
    if patience:
        patience.early_stopping_patience_counter = before.get("evaluations_in_vain", 0)
    seal = checkpoints.Seal(
        job.output,
        lambda: {
            "seconds": log.seconds,
            "budget": engine.budget,
            "evaluations_in_vain": patience.early_stopping_patience_counter if patience else 0,
        },
    )
    stop = StopOnSignal()
    callbacks = [log, seal, stop, *([patience] if patience else [])]
    if job.until:
        callbacks.append(StopAt(duration.rung(settings, job.until)))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.output / "trackers"))
    try:
        trainer = StepTrainer(
            engine=engine,
            batch_size=settings["batch_size"],
            model=learner.model,
            args=_arguments(models.dtype_of(job.source.dtype), settings, job.output, job.seed, validation is not None),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    except (RuntimeError, ValueError, ImportError, KeyError) as error:
        if not settings["report_to"]:
            raise
        raise SettingsError(f"finetune.report_to: {', '.join(settings['report_to'])}: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.log_file, trainer.stop, trainer.patience, trainer.sharded = log, stop, patience, learner.sharded
    trainer.restoring, trainer.operations = learner.kind.restore, duration.OPERATIONS[settings.get("train", "lora")]
    trainer.start_alike()
    return trainer


def _arguments(dtype, settings, output, seed, validates):
    world = processes.count()
    if settings["batch_size"] < world:
        raise SettingsError(
            f"finetune.batch_size: {settings['batch_size']} examples a step for {world} processes; "
            "raise it, or lower resources_per_job.finetune.gpu"
        )
    device = models.device().type
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings["batch_size"] // world,
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"] or -1,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        weight_decay=settings["weight_decay"],
        warmup_steps=settings["warmup_steps"],
        # every checkpoint at a logged step: a resumed training then logs what an undisturbed one does
        logging_steps=math.gcd(10, settings["eval_steps"], settings["save_steps"]),
        logging_nan_inf_filter=False,  # the filter would show the last good loss in place of NaN
        eval_strategy="steps" if validates else "no",
        eval_steps=settings["eval_steps"],
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False,
        save_strategy="steps",
        save_steps=settings["save_steps"],
        remove_unused_columns=False,
        bf16=dtype == torch.bfloat16 and device == "cuda",
        fp16=dtype == torch.float16 and device == "cuda",
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and world > 1 else None,
        report_to=settings["report_to"] or "none",
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
    )


class StepTrainer(Trainer):
    """Trains on examples {input_ids, labels, row} by an `arrangement.Engine`, `batch_size` of them a step."""

    def __init__(self, *, engine, batch_size, **options):
        self.engine, self.batch_size = engine, batch_size
        self.log_file = self.stop = self.patience = None
        self.sharded, self.restoring, self.operations = False, None, duration.OPERATIONS["lora"]
        super().__init__(**options)

    def create_accelerator_and_postprocess(self):
        """As in Trainer, but models stay unwrapped: `training_step` sums the gradients of several processes itself."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def start_alike(self):
        """The same adapter in every process, and dropout masks of its own in each."""
        if self.args.world_size > 1:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    distributed.broadcast(parameter.data, 0)
            self.stop.agree = self._any_process
        torch.manual_seed(self.args.seed + self.args.process_index)

    def _any_process(self, asked):
        flag = torch.tensor(float(asked), device=self.args.device)
        distributed.all_reduce(flag)
        return bool(flag)

    def _wrap_model(self, model, training=True, dataloader=None):
        return model

    def get_train_dataloader(self):
        """The examples of one optimizer step at a time, the same in every process."""
        sampler = StepSampler(len(self.train_dataset), self.batch_size, self.args.data_seed)
        return StepLoader(self.train_dataset, batch_sampler=sampler, collate_fn=together)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Gradients of one optimizer step; returns its mean loss a target token, over all processes."""
        model.train()
        examples = inputs["examples"]
        targets = count_targets(examples)
        loss = self._gradients(model, examples, targets)
        if self.args.world_size > 1:
            loss = self._sum_over_processes(model, loss)
        self._check_finite(loss, examples)
        self.state.num_input_tokens_seen += sum(len(example["input_ids"]) for example in examples)
        return loss

    def _gradients(self, model, examples, targets):
        """Backward passes of this process's micro-batches; on out-of-memory all of them again, half as large."""
        while True:
            before = _random_state()
            try:
                return self._backward(examples, targets)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
            self._halve(examples)  # only now: the error held on to what it could not fit
            model.zero_grad()
            _set_random_state(before)

    def _halve(self, examples):
        """Half as many tokens at a time from now on; an error where that cannot help."""
        if self.sharded:
            raise sharding.OutOfMemory(f"out of memory at step {self.state.global_step + 1}")
        longest = max(len(example["input_ids"]) for example in examples)
        if self.engine.budget < longest:
            raise TransientError(
                f"finetune: a single example of {longest} tokens does not fit in the device's memory; set "
                "finetune.gradient_checkpointing: true, or lower finetune.data.cutoff_len"
            )
        self.engine.budget //= 2
        logger.warning(
            "out of memory at step %d: it is done again with %d tokens at a time, and so are all that follow",
            self.state.global_step + 1,
            self.engine.budget,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _backward(self, examples, targets):
        total = torch.zeros((), device=self.args.device)
        for micro in self._micro_batches(examples):
            with self.accelerator.autocast():
                loss = self.engine.summed_loss(micro) / targets
            self.accelerator.backward(loss)
            total += loss.detach().to(total.device)
        return total

    def _micro_batches(self, examples):
        """Of this process's examples: every n-th by length, so that each has about as many tokens as the others."""
        every = examples
        if self.args.world_size > 1:
            examples = sorted(examples, key=lambda example: len(example["input_ids"]))
            examples = examples[self.args.process_index :: self.args.world_size]
        own = self.engine.micro_batches(examples) if examples else []
        if not self.sharded:
            return own
        return sharding.level(list(own), spare=next(iter(self.engine.micro_batches(every[:1]))))

    def _sum_over_processes(self, model, loss):
        """Sum gradients and loss; a process without examples adds zeros."""
        trained = [p for p in model.parameters() if p.requires_grad]
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        flat = torch.cat([loss.float().reshape(1), *(part.float().reshape(-1) for part in parts)])
        distributed.all_reduce(flat)
        for p, part in zip(trained, flat[1:].split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)
        return flat[0].clone()

    def _check_finite(self, loss, examples):
        if not math.isfinite(loss.item()):
            rows = ", ".join(str(example.get("row", "?")) for example in examples[:16])
            raise progress.Diverged(
                f"finetune: the loss is {loss.item()} at step {self.state.global_step + 1} (rows {rows}"
                f"{', ...' if len(examples) > 16 else ''} of the data set); lower finetune.learning_rate, "
                "or train in another dtype (models.X.dtype: float32)"
            )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss a target token over the validation examples, without padding's or batches' influence on it."""
        examples = sorted(eval_dataset or self.eval_dataset, key=lambda example: example["input_ids"])
        started = time.monotonic()
        loss = self._validation_loss(examples)
        seconds = time.monotonic() - started
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_runtime": round(seconds, 4),
            f"{metric_key_prefix}_samples_per_second": round(len(examples) / seconds, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validation_loss(self, examples):
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for start in range(0, len(examples), VALIDATION_ROWS):
            total += self._summed_loss(examples[start : start + VALIDATION_ROWS])
        if self.args.world_size > 1:
            distributed.all_reduce(total)
        return total.item() / count_targets(examples)

    def _summed_loss(self, examples):
        while True:
            try:
                total = 0.0
                for micro in self._micro_batches(examples):
                    with self.accelerator.autocast():
                        total += self.engine.summed_loss(micro).double().to(self.args.device)
                return total
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
            self._halve(examples)

    def floating_point_ops(self, inputs):
        """Forward and backward, by the number of operations a parameter and token."""
        tokens = sum(len(example["input_ids"]) for example in inputs["examples"])
        return self.operations * tokens * self._parameters()

    @functools.cache  # noqa: B019 - one trainer a process
    def _parameters(self):
        return sum(p.numel() for p in self.model.parameters())

    def run(self, resume):
        """Train, from the checkpoint folder `resume` where one is given; leaves the best adapter on the model.

        Returns (the checkpoint with that adapter, facts of the training). Raises Stopped at SIGTERM and Ctrl-C.
        """
        if resume and self._was_at_its_end(resume):
            self._take_state(resume)
            self.restore(self._best(resume))
            return self._best(resume), self._facts()
        self.train(resume_from_checkpoint=str(resume) if resume else None)
        if self.stop.stopped and self.state.global_step < self.state.max_steps:
            raise Stopped(f"finetune: stopped at step {self.state.global_step}, as asked; a rerun goes on from there")
        newest = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._best(newest) != newest:
            self.restore(self._best(newest))
        return self._best(newest), self._facts()

    def run_until(self, step, resume):
        """Train up to `step`, where a checkpoint is left, and return the validation loss there.

        A training that was beyond that step before is left as it is. Raises Stopped at SIGTERM and Ctrl-C.
        """
        if resume and checkpoints.step_of(resume) >= step:
            self._take_state(resume)
        else:
            self.train(resume_from_checkpoint=str(resume) if resume else None)
        losses = {entry["step"]: entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry}
        if step not in losses:
            raise Stopped(f"finetune: stopped at step {self.state.global_step}, as asked; a rerun goes on from there")
        return losses[step]

    @torch.no_grad()
    def example_losses(self):
        """(losses, target tokens) of each validation example: sums over its target tokens, in the data's order."""
        self.model.eval()
        losses = []
        for example in self.eval_dataset:
            with self.accelerator.autocast():
                parts = [
                    self.engine.summed_loss(micro).double().item() for micro in self.engine.micro_batches([example])
                ]
            losses.append(math.fsum(parts))
        return losses, [count_targets([example]) for example in self.eval_dataset]

    def _was_at_its_end(self, checkpoint):
        """Whether nothing is left to train after `checkpoint`: Trainer would run another step."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return state.global_step >= state.max_steps or bool(self.patience and self.patience.exhausted)

    def _best(self, newest):
        best = newest.with_name(f"checkpoint-{self.state.best_global_step or self.state.global_step}")
        if not checkpoints.is_whole(best):
            raise CoppiceError(f"{best}: the best checkpoint is gone or damaged; delete {best.parent} and train again")
        return best

    def _take_state(self, checkpoint):
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.log_file.write_history(self.state)

    def restore(self, checkpoint):
        """Put what was trained, from `checkpoint`, on the model, and the history up to the newest one in the log."""
        self.restoring(self.model, checkpoint, self.args.device)
        if not self.state.log_history:
            self._take_state(max(Path(self.args.output_dir).glob("checkpoint-*"), key=checkpoints.step_of))

    def _facts(self):
        seconds = self.log_file.seconds
        losses = [(entry["eval_loss"], entry["step"]) for entry in self.state.log_history if "eval_loss" in entry]
        best, step = min(losses) if losses else (None, None)
        first = losses[0][0] if losses else None
        return {
            "steps": self.state.global_step,
            "tokens_seen": self.state.num_input_tokens_seen,
            "tokens_per_second": self.state.num_input_tokens_seen / seconds if seconds else None,
            "seconds": seconds,
            "train_loss": progress.mean_loss(self.state.log_history),
            "validation_loss": best,
            "best_step": step,
            "first_validation_loss": first,
            "arrangement": self.engine.arrangement,
            "tokens_at_a_time": self.engine.budget,
            "processes": self.args.world_size,
            "sharded": self.sharded,
            "peak_memory_bytes": records.peak_memory(),
            "warnings": [
                *progress.warnings_of(first, best, step, self.state.global_step),
                *progress.warnings_of_rate(
                    self.args.warmup_steps, self.state.global_step, self.args.lr_scheduler_type.value
                ),
            ],
        }


def _is_out_of_memory(error):
    """Of a GPU or of the CPU; cuBLAS has words of its own for it."""
    own = isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    return own or should_reduce_batch_size(error)


def _random_state():
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def _set_random_state(state):
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
