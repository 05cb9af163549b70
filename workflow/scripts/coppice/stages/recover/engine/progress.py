"""What is seen of a training while it runs, and how it is stopped: its log, its end at a signal."""

import logging
import math
import signal
import time

from transformers import EarlyStoppingCallback, TrainerCallback

from coppice.core.errors import CoppiceError

logger = logging.getLogger("coppice.finetuning")

HEAD = "     step      loss  validation  learning rate  tokens/s  samples/s  time left"


class Diverged(CoppiceError):
    """The loss of a training is not a number."""


class TrainingLog(TrainerCallback):
    """Writes step, losses, learning rate, speed and time left to `training_log.txt`; ends a training whose loss is NaN.

    `seconds_before` is what the training took before a resume; `seconds` what it took in all.
    """

    def __init__(self, path, batch_size, seconds_before=0.0):
        self.path, self.batch_size, self.seconds_before = path, batch_size, seconds_before
        self.began = None

    @property
    def seconds(self):
        """Seconds of training so far, those before a resume counted in."""
        return self.seconds_before + (time.monotonic() - self.began[0] if self.began else 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the log, with the history of the steps before a resume."""
        self.began = (time.monotonic(), state.global_step, state.num_input_tokens_seen)
        if state.is_world_process_zero:
            self.write_history(state)

    def write_history(self, state):
        """The log of what the state remembers: a line a loss, without speeds."""
        entries = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
        self.path.write_text("\n".join([HEAD, *(self._line(state, entry) for entry in entries)]) + "\n", "utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append a line for a logged training or validation loss."""
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

    def _line(self, state, entry, timed=False):
        loss = f"{entry['loss']:.4f}" if "loss" in entry else ""
        validation = f"{entry['eval_loss']:.4f}" if "eval_loss" in entry else ""
        rate = f"{entry['learning_rate']:.2e}" if "learning_rate" in entry else ""
        step = f"{entry.get('step', 0)}/{state.max_steps}"
        line = f"{step:>9}  {loss:>8}  {validation:>10}  {rate:>13}"
        if not timed or self.began is None or state.global_step == self.began[1]:
            return line.rstrip()
        started, first, tokens = self.began
        seconds, steps = time.monotonic() - started, state.global_step - first
        left = seconds / steps * (state.max_steps - state.global_step)
        speed = (state.num_input_tokens_seen - tokens) / seconds
        return f"{line}  {speed:>8.0f}  {steps * self.batch_size / seconds:>9.1f}  {left:>7.0f} s"


class Patience(EarlyStoppingCallback):
    """transformers' early stopping, with a checkpoint where it stops: the evaluations that led there are kept."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Count an evaluation that is no better, and stop after so many."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop:
            control.should_save = True

    @property
    def exhausted(self):
        """Whether the training is at its end."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience


class StopAt(TrainerCallback):
    """Ends a training after `step`, with a checkpoint from which it can go on as if nothing had been."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop at the step."""
        if state.global_step >= self.step:
            control.should_log = control.should_evaluate = control.should_save = control.should_training_stop = True


class StopOnSignal(TrainerCallback):
    """At SIGTERM, a scheduler's warning, and at Ctrl-C: finish the step, write a checkpoint, end the training.

    `stopped` says so. A second Ctrl-C ends it at once.

    In several processes all stop after the same step: `agree` turns what each was `asked` into what all do. There no
    second Ctrl-C is told from the first, which comes twice: from the terminal, and from torch's launcher.

    transformers' own just-in-time checkpoint is not used: it can save between a step's forward pass and its update,
    after which a resumed training draws other dropout masks than an undisturbed one.
    """

    def __init__(self):
        self.asked = self.stopped = False
        self.agree, self._before, self._interrupted = None, {}, False

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the signals over, where this is the main thread; one that is ignored, as Ctrl-C is in the background,
        stays so."""
        heard = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) != signal.SIG_IGN]
        try:
            self._before = {number: signal.signal(number, self._stop) for number in heard}
        except ValueError:
            logger.debug("not the main thread: a signal ends the training without a checkpoint")

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop once the signal has come."""
        self.stopped = self.agree(self.asked) if self.agree else self.asked
        if self.stopped:  # the losses since the last line are logged, so that none is lost
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number, frame):
        if number == signal.SIGINT and self._interrupted and self.agree is None:
            raise KeyboardInterrupt
        self.asked, self._interrupted = True, self._interrupted or number == signal.SIGINT
        logger.warning("told to stop (%s): a checkpoint follows", signal.Signals(number).name)


def warnings_of(first, best, best_step, steps):
    """What the reports have to say about a training."""
    if first is None:
        return ["no validation loss was measured: the last state of the training is the one evaluated"]
    if best >= first and best_step < steps:
        return [f"the validation loss never fell below its first value (first {first:.4f}, best {best:.4f})"]
    return []


def warnings_of_rate(warmup_steps, steps, schedule):
    """What they have to say where a training was over before its learning rate had risen, as on little data."""
    if warmup_steps < steps or schedule == "constant":
        return []
    return [
        f"the learning rate rose to the end of the training and never reached finetune.learning_rate: {steps} steps, "
        f"finetune.warmup_steps {warmup_steps}"
    ]


def mean_loss(history):
    """Mean training loss over all steps, from the means that were logged every few of them."""
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = entry["step"]
    return total / before if before else None
