"""`transformers.Trainer` with a step of our own: whole optimizer steps as batches, arranged without waste.

The loader yields the examples of one optimizer step at a time, in an order that depends on seed and epoch alone, so a
resumed training sees what an undisturbed one would. In several processes each takes its share of a step's
micro-batches, and the gradients are summed before the optimizer's step: the same step as in one process.
"""

import functools
import logging
import math
import os
import time
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerState, TrainingArguments

from .. import models, records
from ..errors import CoppiceError, SettingsError
from . import checkpoints, processes
from .arrangement import Engine, count_targets
from .progress import StopOnTerm, TrainingLog

logger = logging.getLogger("coppice.finetuning")

VALIDATION_ROWS = 256  # examples that are arranged together
ORDERS = 1_000_003  # keeps the orders of neighbouring seeds and epochs apart


def build(model, tokenizer, train, validation, settings, output, seed, resume=None):
    """A LoraTrainer for `model` on examples, with the settings of the section `finetune`; `resume` is a checkpoint."""
    before = checkpoints.facts_of(resume) if resume else {}
    budget = settings["micro_batch_size"] * settings["data"]["cutoff_len"]
    engine = Engine(model, before.get("budget", budget), settings["arrangement"])
    log = TrainingLog(output / "training_log.txt", settings["batch_size"], before.get("seconds", 0.0))
    seal = checkpoints.Seal(output, lambda: {"seconds": log.seconds, "budget": engine.budget})
    callbacks = [log, seal, StopOnTerm()]
    if settings["early_stopping"] and validation:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings["early_stopping"]))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / "trackers"))
    trainer = LoraTrainer(
        engine=engine,
        batch_size=settings["batch_size"],
        model=model,
        args=_arguments(model, settings, output, seed, validation is not None),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.log_file, trainer.stop = log, callbacks[2]
    # every process draws its own dropout masks; in one process the seed is the study's
    torch.manual_seed(seed + trainer.args.process_index)
    return trainer


def _arguments(model, settings, output, seed, validates):
    world = int(os.environ.get(processes.WORLD, 1))
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
        logging_steps=min(10, settings["eval_steps"]),
        logging_nan_inf_filter=False,  # the filter would show the last good loss in place of NaN
        eval_strategy="steps" if validates else "no",
        eval_steps=settings["eval_steps"],
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False,
        save_strategy="steps",
        save_steps=settings["save_steps"],
        save_total_limit=2,  # the best and the newest
        remove_unused_columns=False,
        bf16=next(model.parameters()).dtype.itemsize == 2 and device == "cuda",
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and world > 1 else None,
        report_to=settings["report_to"] or "none",
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
    )


class LoraTrainer(Trainer):
    """Trains on examples {input_ids, labels, row} by an `arrangement.Engine`, `batch_size` of them a step."""

    def __init__(self, *, engine, batch_size, **options):
        self.engine, self.batch_size = engine, batch_size
        self.log_file = self.stop = None
        super().__init__(**options)

    def create_accelerator_and_postprocess(self):
        """As in Trainer, but models stay unwrapped: `training_step` sums the gradients of several processes itself."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _wrap_model(self, model, training=True, dataloader=None):
        return model

    def get_train_dataloader(self):
        """The examples of one optimizer step at a time, the same in every process."""
        sampler = StepSampler(len(self.train_dataset), self.batch_size, self.args.data_seed)
        return _StepLoader(self.train_dataset, batch_sampler=sampler, collate_fn=_together)

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
                if not _is_out_of_memory(error) or self.engine.budget <= 1:
                    raise
            self._halve(model, before)

    def _halve(self, model, random_state):
        self.engine.budget = max(1, self.engine.budget // 2)
        logger.warning(
            "out of memory at step %d: the step is done again with %d tokens at a time, and all that follow",
            self.state.global_step + 1,
            self.engine.budget,
        )
        model.zero_grad()
        _set_random_state(random_state)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _backward(self, examples, targets):
        total = torch.zeros((), device=self.args.device)
        for micro in self._share(self.engine.micro_batches(examples)):
            with self.accelerator.autocast():
                loss = self.engine.summed_loss(micro) / targets
            self.accelerator.backward(loss)
            total += loss.detach().to(total.device)
        return total

    def _sum_over_processes(self, model, loss):
        """Sum gradients and loss; a process without micro-batches adds zeros. All hear of a signal that one has got."""
        trained = [p for p in model.parameters() if p.requires_grad]
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        head = torch.stack([loss.float(), torch.tensor(float(self.stop.stopped), device=loss.device)])
        flat = torch.cat([head, *(part.float().reshape(-1) for part in parts)])
        distributed.all_reduce(flat)
        for p, part in zip(trained, flat[2:].split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)
        self.stop.stopped = bool(flat[1])
        return flat[0].clone()

    def _share(self, micro_batches):
        """This process's micro-batches: every n-th of n processes."""
        if self.args.world_size == 1:
            return micro_batches
        return list(micro_batches)[self.args.process_index :: self.args.world_size]

    def _check_finite(self, loss, examples):
        if not math.isfinite(loss.item()):
            rows = ", ".join(str(example.get("row", "?")) for example in examples[:16])
            raise CoppiceError(
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
            for micro in self._share(self.engine.micro_batches(examples[start : start + VALIDATION_ROWS])):
                with self.accelerator.autocast():
                    total += self.engine.summed_loss(micro).double().to(total.device)
        if self.args.world_size > 1:
            distributed.all_reduce(total)
        return total.item() / count_targets(examples)

    def floating_point_ops(self, inputs):
        """Forward and backward through frozen weights: four operations a parameter and token."""
        tokens = sum(len(example["input_ids"]) for example in inputs["examples"])
        return 4 * tokens * self._parameters()

    @functools.cache  # noqa: B019 - one trainer a process
    def _parameters(self):
        return sum(p.numel() for p in self.model.parameters())

    def run(self, resume):
        """Train, from the checkpoint folder `resume` where one is given; leaves the best adapter on the model.

        Returns (the checkpoint with that adapter, facts of the training). Raises Stopped at SIGTERM.
        """
        self.train(resume_from_checkpoint=str(resume) if resume else None)
        if self.stop.stopped and self.state.global_step < self.state.max_steps:
            raise Stopped(f"finetune: stopped at step {self.state.global_step}, as asked; a rerun goes on from there")
        best = self.state.best_global_step or self.state.global_step
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{best}"
        if best != self.state.global_step:
            self.restore(checkpoint)
        return checkpoint, self._facts()

    def restore(self, checkpoint):
        """Put the adapter in `checkpoint` on the model, and the history up to the newest checkpoint in the log."""
        from peft import load_peft_weights, set_peft_model_state_dict

        weights = load_peft_weights(str(checkpoint), device=str(self.args.device))
        set_peft_model_state_dict(self.model, weights)
        if not self.state.log_history:
            newest = max(Path(self.args.output_dir).glob("checkpoint-*"), key=checkpoints.step_of)
            self.state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
            self.log_file.write_history(self.state)

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
            "train_loss": _mean_loss(self.state.log_history),
            "validation_loss": best,
            "best_step": step,
            "first_validation_loss": first,
            "arrangement": self.engine.arrangement,
            "tokens_at_a_time": self.engine.budget,
            "processes": self.args.world_size,
            "peak_memory_bytes": records.peak_memory(),
            "warnings": warnings_of(first, best, step, self.state.global_step),
        }


class Stopped(CoppiceError):
    """The training was told to stop and wrote a checkpoint."""


class StepSampler:
    """The indices of each optimizer step's examples; every epoch another order, given by `seed` and epoch alone."""

    def __init__(self, count, size, seed):
        self.count, self.size, self.seed, self.epoch = count, size, seed, 0

    def set_epoch(self, epoch):
        """Choose the order of `epoch`, from 0."""
        self.epoch = epoch

    def __len__(self):
        return math.ceil(self.count / self.size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * ORDERS + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, self.count, self.size):
            yield order[start : start + self.size]


class _StepLoader(DataLoader):
    def set_epoch(self, epoch):
        """Trainer calls this before each epoch."""
        self.batch_sampler.set_epoch(epoch)


def warnings_of(first, best, best_step, steps):
    """What the reports have to say about a training."""
    if first is None:
        return ["no validation loss was measured: the last state of the training is the one evaluated"]
    if best >= first and best_step < steps:
        return [f"the validation loss never fell below its first value (first {first:.4f}, best {best:.4f})"]
    return []


def _mean_loss(history):
    """Mean training loss over all steps, from the means that were logged every few of them."""
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = entry["step"]
    return total / before if before else None


def _together(examples):
    return {"examples": examples}


def _is_out_of_memory(error):
    """A GPU's own error, or the CPU allocator's, which is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _random_state():
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def _set_random_state(state):
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
