"""Train with `transformers.Trainer`, but with training steps and validation by the engine of `batching`.

Trainer creates the optimizer and the schedule, writes checkpoints and calls the callbacks. A batch is a whole optimizer
step: the loader yields its examples in an order that depends on seed and epoch only, so a resumed training sees the
same steps as an uninterrupted one. Each of several processes takes a part of a step's examples, and gradients are
summed before the optimizer's step, so the step is the same as in one process.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerState

from coppice import models
from coppice.core.aliases import Record
from coppice.core.errors import CoppiceError, SettingsError, Stopped, TransientError
from coppice.models import random_states
from coppice.models.kinds import Engine, Example, MicroBatch, ModelKind

from ..base import Diverged, Objective, Recovery
from ..job import Job, Learner
from . import checkpoints, duration, learning_rates, memory, outcome, processes, sharding
from .best_by import Asking, BestBy
from .loader import StepLoader, StepSampler, together
from .progress import Corrections, Patience, StopAt, StopOnSignal, TrainingLog
from .training_arguments import training_arguments
from .validation import Validation

logger = logging.getLogger("coppice.finetuning")


def build(
    job: Job,
    learner: Learner,
    reader: models.Reader,
    train: Sequence[Example],
    validation: Sequence[Example] | None,
    asking: Asking | None = None,
) -> StepTrainer:
    """Return a StepTrainer for the model of `learner` (a Learner) on the examples `train` and `validation`.

    With `job.request.stop_share` it stops after that fraction of the training. `asking` measures the metric that the
    best checkpoint is chosen by, if that is not the loss.
    """
    best_by = asking.best_by if asking else BestBy()
    settings, resume = learner.settings, job.resume
    before = checkpoints.facts_of(resume) if resume else {}
    engine = learner.kind.engine(learner.model, job.token_limit, settings.arrangement)
    if obstacle := learner.recovery.objective.obstacle(engine):
        raise SettingsError(obstacle)
    log = TrainingLog(job.request.output / "training_log.txt", settings.batch_size, before)
    patience = Patience(settings.early_stopping) if settings.early_stopping and validation else None
    if patience:
        # Trainer does not restore this count, so early stopping would count from zero after every resume
        patience.early_stopping_patience_counter = before.get("evaluations_in_vain", 0)
    seal = checkpoints.Seal(
        job.request.output,
        lambda: {
            **log.facts(),
            "budget": engine.token_limit,  # the limit when the checkpoint is written: it may have been halved
            "evaluations_in_vain": patience.early_stopping_patience_counter if patience else 0,
        },
        best_by,
    )
    stop = StopOnSignal()
    corrections = Corrections(learner.recovery.trained, learner.model, resume)
    callbacks = [corrections, log, seal, stop, *([patience] if patience else [])]
    if job.request.stop_share:
        callbacks.append(StopAt(duration.rung(settings, job.request.stop_share)))
    # transformers takes the folder of TensorBoard's files from the environment only
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.request.output / "trackers"))
    try:
        trainer = StepTrainer(
            kind=learner.kind,
            recovery=learner.recovery,
            engine=engine,
            batch_size=settings.batch_size,
            model=learner.model,
            args=training_arguments(
                models.dtype_of(job.request.source.dtype),
                settings,
                job.request.output,
                job.request.seed,
                best_by if validation else None,
            ),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=reader.tokenizer,
            callbacks=callbacks,
        )
    except (RuntimeError, ValueError, ImportError, KeyError) as error:
        if not settings.report_to:
            raise
        raise SettingsError(
            f"finetune.report_to: {', '.join(settings.report_to)}: {error}. Install the tracker, or remove it there."
        ) from error
    trainer.remove_callback(PrinterCallback)  # TrainingLog logs instead
    trainer.log_file, trainer.stop, trainer.patience, trainer.sharded = log, stop, patience, learner.sharded
    trainer.best_by, trainer.asking = best_by, asking
    trainer.rates = learner.recovery.trained.rates(learner.model, learner.kind, settings)
    trainer.start_alike()
    return trainer


class StepTrainer(Validation):
    """Trains on the examples of a `kind` of model with an engine of that kind, `batch_size` examples per step."""

    # set by `build`
    log_file: TrainingLog
    stop: StopOnSignal
    patience: Patience | None = None
    best_by: BestBy
    rates: Mapping[float, Collection[nn.Parameter]] = MappingProxyType({})

    def __init__(
        self, *, kind: ModelKind, recovery: Recovery, engine: Engine, batch_size: int, **options: object
    ) -> None:
        """Build a trainer; `options` are the arguments of `transformers.Trainer`."""
        self.kind, self.recovery, self.engine, self.batch_size = kind, recovery, engine, batch_size
        super().__init__(**options)
        if kind.coupled:
            engine.gathers = self.args.world_size > 1

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as Trainer does, and give parameters in `rates` their own learning rate."""
        if self.optimizer is None:  # Trainer calls this more than once
            super().create_optimizer(model)
            learning_rates.split(self.optimizer, self.rates)
        return self.optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate as Trainer does, but leave the model unwrapped."""
        super().create_accelerator_and_postprocess()
        # DistributedDataParallel averages gradients in each backward pass, but processes have different numbers of
        # micro-batches and targets: `training_step` sums the gradients once, after the last micro-batch.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def start_alike(self) -> None:
        """Give every process the same trained parameters, but its own random numbers for dropout."""
        if self.args.world_size > 1:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    distributed.broadcast(parameter.data, 0)
            self.stop.agree = self._any_process
        # with one seed, the examples of all processes would have the same dropout masks
        torch.manual_seed(self.args.seed + self.args.process_index)

    def _any_process(self, asked: bool) -> bool:
        # if one process was asked to stop, all must stop: the others would wait for its gradients in the next step
        flag = torch.tensor(float(asked), device=self.args.device)
        distributed.all_reduce(flag)
        return bool(flag)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        return model  # see `create_accelerator_and_postprocess`: Trainer wraps in both places

    def get_train_dataloader(self) -> StepLoader:
        """Return a loader of the examples of one optimizer step at a time, the same in every process."""
        # not prepared by accelerate, which would give each process different batches: `_micro_batches` divides a batch
        sampler = StepSampler(len(self.train_dataset), self.batch_size, self.args.data_seed)
        return StepLoader(self.train_dataset, batch_sampler=sampler, collate_fn=together)

    def training_step(
        self, model: nn.Module, inputs: dict[str, list[Example]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute the gradients of one optimizer step; return its mean loss per target token, over all processes."""
        model.train()
        examples = inputs["examples"]
        # The loss normalizer: the targets of the whole step, in all processes. A mean per micro-batch would weight a
        # target by how few others share its micro-batch. (`num_items_in_batch` is None: Trainer finds no labels.)
        loss = self._gradients(model, examples, targets=self.kind.targets(examples))
        if self.args.world_size > 1:
            loss = processes.sum_gradients(model, loss)
        self._check_finite(loss, examples)  # before the optimizer's step, so that no NaN gets into the weights
        # in Trainer's state, so that a resumed training goes on counting
        self.state.num_input_tokens_seen += sum(map(self.kind.length, examples))
        return loss  # the same in every process, because Trainer logs the mean over processes

    def _gradients(self, model: nn.Module, examples: list[Example], targets: int) -> torch.Tensor:
        """Run the backward passes of this process; if memory runs out, repeat them with half the token limit."""
        while True:
            # a repeated step starts from the same random state as if the lower limit had been set from the beginning
            before = random_states.current()
            try:
                return self._backward(examples, targets)
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
            # Outside of `except`, because the traceback of the error keeps the tensors alive that did not fit.
            self._halve(examples)
            model.zero_grad()  # drop the gradients of the micro-batches that did fit
            random_states.restore(before)

    def _halve(self, examples: list[Example]) -> None:
        """Halve the token limit for the rest of the training; raise an error if that cannot help."""
        # Processes that gather weights or embeddings together cannot repeat a step alone: all must start again.
        if self.sharded or (self.kind.coupled and self.args.world_size > 1):
            raise sharding.OutOfMemory(f"out of memory at step {self.state.global_step + 1}")
        longest = max(map(self.kind.length, examples))
        if self.engine.token_limit < longest:  # the longest example ran alone already
            raise TransientError(
                f"finetune: a single example of {longest} tokens does not fit in the device's memory. Set "
                "finetune.gradient_checkpointing: true, or lower finetune.data.cutoff_len."
            )
        self.engine.token_limit //= 2
        logger.warning(
            "out of memory at step %d: repeating it, and running all later steps, with %d tokens at a time",
            self.state.global_step + 1,
            self.engine.token_limit,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _backward(self, examples: list[Example], targets: int) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        for micro in self._micro_batches(examples):
            with self.accelerator.autocast():
                loss = self._loss(micro) / targets
            self.accelerator.backward(loss)  # one micro-batch at a time, so that only its activations are in memory
            total += loss.detach().to(total.device)
        return total

    def _loss(self, micro: MicroBatch, objective: Objective | None = None) -> torch.Tensor:
        return (objective or self.recovery.objective).summed_loss(self.engine, micro)

    def reported_losses(self) -> dict[str, float]:
        """Return the further losses that the objective reports, with the weights as they are now."""
        if not self.eval_dataset:
            return {}
        rows = sorted(self.eval_dataset, key=self.kind.sort_key)
        return {name: self._validation_loss(rows, one) for name, one in self.recovery.objective.reported.items()}

    def _micro_batches(self, examples: list[Example]) -> list[MicroBatch]:
        """Return the micro-batches of this process's part of the examples."""
        every = examples
        if self.args.world_size > 1:
            # every n-th example in order of length, so that each process has about the same number of tokens
            examples = sorted(examples, key=self.kind.length)
            examples = examples[self.args.process_index :: self.args.world_size]
        with self.accelerator.autocast():  # an engine may run the model; coupled processes then exchange embeddings
            own = list(self.engine.micro_batches(examples)) if examples or self.kind.coupled else []
        if not self.sharded:
            return own
        # even a process without examples needs a spare micro-batch, so it is made from the examples of all processes
        return sharding.level(own, spare=next(iter(self.engine.micro_batches(every[:1]))))

    def _check_finite(self, loss: torch.Tensor, examples: list[Example]) -> None:
        if not math.isfinite(loss.item()):
            # the loss is a sum over all processes, so all of them raise this, and all examples are suspects
            rows = ", ".join(str(example.get("row", "?")) for example in examples[:16])
            raise Diverged(
                f"finetune: the loss is {loss.item()} at step {self.state.global_step + 1} (rows {rows}"
                f"{', ...' if len(examples) > 16 else ''} of the data set); lower finetune.learning_rate, "
                "or train in another dtype (models.X.dtype: float32)"
            )

    def floating_point_ops(self, inputs: dict[str, list[Example]]) -> float:
        """Return the operations of a batch, as the recovery counts them; Trainer's estimate needs tensors."""
        tokens = sum(map(self.kind.length, inputs["examples"]))
        return self.recovery.operations(self._parameters()) * tokens

    @functools.cache  # noqa: B019 - one trainer per process
    def _parameters(self) -> int:
        return models.parameters(self.model)

    def run(self, resume: Path | None) -> tuple[Path, Record]:
        """Train to the end, and leave the best adapter (or weights) on the model.

        resume: the folder of the checkpoint to continue from, or None. Returns (best checkpoint, facts about the
        training). Raises Stopped after SIGTERM or Ctrl-C.
        """
        if resume and self._was_at_its_end(resume):
            self._take_state(resume)
            self.restore(self._best(resume))
            return self._best(resume), outcome.facts_of(self)
        self.train(resume_from_checkpoint=str(resume) if resume else None)
        # a signal during the last step changes nothing, since the training is complete
        if self.stop.stopped and self.state.global_step < self.state.max_steps:
            raise self._stopped()
        newest = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._best(newest) != newest:
            self.restore(self._best(newest))
        return self._best(newest), outcome.facts_of(self)

    def _stopped(self) -> Stopped:
        return Stopped(
            f"finetune: stopped at step {self.state.global_step} on request. Run the same command again to continue."
        )

    def run_until(self, step: int, resume: Path | None) -> float:
        """Train up to `step`, write a checkpoint, and return the validation loss there.

        A training that has passed that step already is not trained further. Raises Stopped after SIGTERM or Ctrl-C.
        """
        if resume and checkpoints.step_of(resume) >= step:
            self._take_state(resume)
        else:
            self.train(resume_from_checkpoint=str(resume) if resume else None)
        losses = {entry["step"]: entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry}
        if step not in losses:  # a signal stopped the training before the step
            raise self._stopped()
        return losses[step]

    def _was_at_its_end(self, checkpoint: Path) -> bool:
        """Return whether nothing is left to train after `checkpoint`."""
        # checked before `train`, because Trainer would run one more step before it notices
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return state.global_step >= state.max_steps or bool(self.patience and self.patience.exhausted)

    def _best(self, newest: Path) -> Path:
        best = newest.with_name(f"checkpoint-{self.state.best_global_step or self.state.global_step}")
        if not checkpoints.is_whole(best):
            raise CoppiceError(
                f"{best}: the best checkpoint is missing or damaged. Delete {best.parent} and train again."
            )
        return best

    def _take_state(self, checkpoint: Path) -> None:
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.log_file.write_history(self.state)

    def restore(self, checkpoint: Path) -> None:
        """Load the weights in `checkpoint` into the model, and write the history of the newest one to the log."""
        self.recovery.trained.restore(self.model, checkpoint, self.args.device)
        # the history must include the last step, even if the best checkpoint is an earlier one
        if not self.state.log_history:
            self._take_state(max(Path(self.args.output_dir).glob("checkpoint-*"), key=checkpoints.step_of))
