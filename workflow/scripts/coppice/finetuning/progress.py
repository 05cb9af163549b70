"""The training log that a person reads: a line every few steps, on the terminal and in `training_log.txt`."""

import logging
import math
import time

from transformers import TrainerCallback

from ..errors import CoppiceError

logger = logging.getLogger("coppice.finetuning")

HEAD = "     step      loss  validation  learning rate  tokens/s  samples/s  time left"


class TrainingLog(TrainerCallback):
    """Writes step, losses, learning rate, speed and time left; ends the training at a loss that is not finite."""

    def __init__(self, path):
        self.path = path
        self.began = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the log, with the history of the steps before a resume."""
        self.began = (time.monotonic(), state.global_step, state.num_input_tokens_seen)
        lines = [
            self._line(args, state, entry) for entry in state.log_history if "loss" in entry or "eval_loss" in entry
        ]
        self.path.write_text("\n".join([HEAD, *lines]) + "\n", encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append a line for a logged training or validation loss."""
        for key in ("loss", "eval_loss"):
            if key in logs and not math.isfinite(logs[key]):
                raise CoppiceError(
                    f"finetune: {key} is {logs[key]} at step {state.global_step}; "
                    "lower finetune.learning_rate or train in another dtype (models.X.dtype)"
                )
        if "loss" not in logs and "eval_loss" not in logs:
            return
        line = self._line(args, state, logs | {"step": state.global_step}, timed=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        logger.info("%s", line)

    def _line(self, args, state, entry, timed=False):
        loss = f"{entry['loss']:.4f}" if "loss" in entry else ""
        validation = f"{entry['eval_loss']:.4f}" if "eval_loss" in entry else ""
        rate = f"{entry['learning_rate']:.2e}" if "learning_rate" in entry else ""
        step = f"{entry.get('step', 0)}/{state.max_steps}"
        line = f"{step:>9}  {loss:>8}  {validation:>10}  {rate:>13}"
        if not timed or self.began is None or state.global_step == self.began[1]:
            return line.rstrip()
        started, first, tokens = self.began
        seconds = time.monotonic() - started
        steps = state.global_step - first
        examples = steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
        left = seconds / steps * (state.max_steps - state.global_step)
        speed = (state.num_input_tokens_seen - tokens) / seconds
        return f"{line}  {speed:>8.0f}  {examples / seconds:>9.1f}  {left:>7.0f} s"
