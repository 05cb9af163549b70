"""Trainer callbacks that log a training while it runs and that stop it early, at a signal or at a given step."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coppice.core.aliases import Record

from ..base import Diverged, Trained
from .best_by import BestBy, Found

logger = logging.getLogger("coppice.finetuning")

Handler = Callable[[int, FrameType | None], object] | int | None  # of a signal, as `signal.signal` returns it
UNSHOWN = ("eval_loss", "eval_runtime", "eval_samples_per_second")  # of a validation, in its own column or nowhere
HEAD = "     step      loss  validation  learning rate  tokens/s  samples/s  time left"


class Corrections(TrainerCallback):
    """Lets a recovery check what a resumed training starts from, and correct weights after each optimizer step.

    resume: the checkpoint to resume from, or None.
    """

    def __init__(self, trained: Trained, model: nn.Module, resume: Path | None) -> None:
        """Take what is trained, and the checkpoint to resume from."""
        self.trained, self.model, self.resume = trained, model, resume

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Load the checkpoint's weights again: Trainer has done so, but only logs a tensor that did not arrive."""
        if self.resume:
            self.trained.restore(self.model, self.resume, args.device)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Correct the weights."""
        self.trained.after_step(self.model)


class TrainingLog(TrainerCallback):
    """Writes step, losses, learning rate, speed and time left to `training_log.txt`; raises Diverged for a NaN loss.

    before: the `facts` at the checkpoint from which a training is resumed. `seconds` includes the time until then;
    `resumes` has (step, time) of every resume.
    """

    def __init__(self, path: Path, batch_size: int, before: Record | None = None) -> None:
        """Log to the file `path` a training with `batch_size` examples per step."""
        before = before or {}
        self.path, self.batch_size, self.seconds_before = path, batch_size, before.get("seconds", 0.0)
        self.resumes: list[tuple[int, str]] = list(before.get("resumes", ()))
        # (time, step, tokens) at the start of this process: speed is measured from here
        self.began: tuple[float, int, int] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return self.seconds_before + (time.monotonic() - self.began[0] if self.began else 0.0)

    def facts(self) -> Record:
        """Return what a resumed training must know of the log: {seconds, resumes}."""
        return {"seconds": self.seconds, "resumes": self.resumes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the log, with the history of the steps before a resume."""
        self.began = (time.monotonic(), state.global_step, state.num_input_tokens_seen)
        if state.global_step:
            self.resumes.append((state.global_step, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())))
        # rewritten, not continued: a killed training has logged steps beyond its last checkpoint, which are run again
        if state.is_world_process_zero:
            self.write_history(state)

    def write_history(self, state: TrainerState) -> None:
        """Rewrite the log from the losses and resumes, without speeds, which the state does not hold."""
        losses = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
        lines = [(entry.get("step", 0), self._line(state, entry)) for entry in losses]
        lines += [
            (step, f"{f'{step}/{state.max_steps}':>9}  resumed from here on {when}") for step, when in self.resumes
        ]
        lines.sort(key=lambda line: line[0])
        self.path.write_text("\n".join([HEAD, *(line for _, line in lines)]) + "\n", "utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Append a line for a training or validation loss."""
        # checked in every process, because each of them must end
        for key in ("loss", "eval_loss"):
            if key in logs and not math.isfinite(logs[key]):
                raise Diverged(
                    f"finetune: {key} is {logs[key]} at step {state.global_step}; "
                    "lower finetune.learning_rate or train in another dtype (models.X.dtype: float32)"
                )
        if ("loss" not in logs and "eval_loss" not in logs) or not state.is_world_process_zero:
            return
        line = self._line(state, logs | {"step": state.global_step}, timed=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        logger.info("%s", line)

    def _line(self, state: TrainerState, entry: Record, timed: bool = False) -> str:
        loss = f"{entry['loss']:.4f}" if "loss" in entry else ""
        validation = f"{entry['eval_loss']:.4f}" if "eval_loss" in entry else ""
        rate = f"{entry['learning_rate']:.2e}" if "learning_rate" in entry else ""
        others = [name for name in entry if name.startswith("eval_") and name not in UNSHOWN]
        metric = "".join(f"  {name.removeprefix('eval_')} {entry[name]:.4f}" for name in others)
        step = f"{entry.get('step', 0)}/{state.max_steps}"
        line = f"{step:>9}  {loss:>8}  {validation:>10}  {rate:>13}"
        # lines of the history have no time, and before its first step this process has no speed
        if not timed or self.began is None or state.global_step == self.began[1]:
            return f"{line.rstrip()}{metric}"
        started, first, tokens = self.began
        seconds, steps = time.monotonic() - started, state.global_step - first
        left = seconds / steps * (state.max_steps - state.global_step)
        speed = (state.num_input_tokens_seen - tokens) / seconds
        return f"{line}  {speed:>8.0f}  {steps * self.batch_size / seconds:>9.1f}  {left:>7.0f} s{metric}"


class Patience(EarlyStoppingCallback):
    """transformers' early stopping, with a checkpoint at the step where it stops."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Count evaluations without improvement, and stop after too many."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop:
            # keeps the evaluations that led here: a resumed training would repeat the steps since the last checkpoint
            control.should_save = True

    @property
    def exhausted(self) -> bool:
        """Whether the patience is used up, so that the training is over."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience


class StopAt(TrainerCallback):
    """Stops a training after `step`, with a checkpoint to continue from."""

    def __init__(self, step: int) -> None:
        """Stop after the optimizer step `step`."""
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save and stop at the step."""
        # Logging is due too: Trainer keeps the losses since the last log line in memory, not in the checkpoint. The
        # validation loss is what the arms of a race are compared by.
        if state.global_step >= self.step:
            control.should_log = control.should_evaluate = control.should_save = control.should_training_stop = True


class StopOnSignal(TrainerCallback):
    """Stops a training at SIGTERM (a scheduler's warning) or Ctrl-C: finish the step, write a checkpoint, end.

    `asked` is whether this process got a signal, `stopped` whether the training ended for one. A second Ctrl-C ends the
    training at once.

    If there are several processes, all must stop after the same step: `agree` turns what each was asked into what all
    do. A second Ctrl-C has no effect then, because each process gets the first one twice: from the terminal, and from
    torch's launcher.

    transformers' own just-in-time checkpoint is not used: it can save between a step's forward pass and its update, and
    a resumed training would then draw other dropout masks than an uninterrupted one.
    """

    def __init__(self) -> None:
        """Wait for signals from the beginning of the training on."""
        self.asked = self.stopped = self._interrupted = False
        self.agree: Callable[[bool], bool] | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Install the signal handlers, except for signals that are ignored."""
        # A shell starts background jobs with Ctrl-C ignored: it is meant for the job in the foreground only.
        heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
        try:
            self._before = {number: signal.signal(number, self._stop) for number in heard}
        except ValueError:  # Python installs signal handlers in the main thread only
            logger.debug("not the main thread: a signal ends the training without a checkpoint")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save and stop if a signal has arrived."""
        # only here, between two steps: `_stop` may run at any moment, in the middle of a step too
        self.stopped = self.agree(self.asked) if self.agree else self.asked
        if self.stopped:
            # Trainer keeps the losses since the last log line in memory, not in the checkpoint: log them now
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted and self.agree is None:
            raise KeyboardInterrupt
        self.asked, self._interrupted = True, self._interrupted or number == signal.SIGINT
        logger.warning("%s received: stopping after this step, with a checkpoint", signal.Signals(number).name)


def warnings_of(found: Found, steps: int, best_by: BestBy) -> list[str]:
    """Return warnings about the validation of a training, which every report repeats.

    found: the first and the best value; steps: how many were trained; best_by: what they are values of.
    """
    first, best, best_step = found[:3]
    if first is None:
        return ["no validation loss was measured: the last state of the training is the one evaluated"]
    # if the only validation was after the last step, there is no later loss that could have been lower
    if not best_by.better(best, first) and best_step < steps:
        moved = "rose above" if best_by.higher_is_better else "fell below"
        return [f"the validation {best_by.key} never {moved} its first value (first {first:.4f}, best {best:.4f})"]
    return []


def warnings_of_rate(warmup_steps: int, steps: int, schedule: str) -> list[str]:
    """Return a warning if the training ended during the warm-up of its learning rate, as it does on little data."""
    if warmup_steps < steps or schedule == "constant":
        return []
    return [
        f"the learning rate rose to the end of the training and never reached finetune.learning_rate: {steps} steps, "
        f"finetune.warmup_steps {warmup_steps}"
    ]


def mean_loss(history: Iterable[Record]) -> float | None:
    """Return the mean training loss over all steps, or None if none was logged."""
    # an entry is the mean since the entry before it, and the last one may cover fewer steps: weight by their number
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = entry["step"]
    return total / before if before else None
