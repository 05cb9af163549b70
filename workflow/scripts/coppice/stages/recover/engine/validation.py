"""Measure the validation examples: the part of the trainer that changes no weight."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import distributed
from transformers import Trainer

from coppice.models.kinds import Engine, Example, ModelKind

from ..base import Objective
from . import memory
from .best_by import Asking
from .loader import blocks

if TYPE_CHECKING:
    from accelerate import Accelerator


class Validation(Trainer):
    """The validation of `trainer.StepTrainer`, which runs micro-batches and halves the token limit."""

    kind: ModelKind
    engine: Engine
    accelerator: Accelerator
    asking: Asking | None = None  # measures a metric besides the loss
    sharded: bool = False

    def evaluate(
        self,
        eval_dataset: Sequence[Example] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the mean loss per target over the validation examples, and the metric that checkpoints go by."""
        # in an order that puts examples together which share work
        examples = sorted(eval_dataset or self.eval_dataset, key=self.kind.sort_key)
        started = time.monotonic()
        loss = self._validation_loss(examples)
        measured = self.asking.measure(self.model, self.sharded) if self.asking else {}
        seconds = time.monotonic() - started
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            **measured,
            f"{metric_key_prefix}_runtime": round(seconds, 4),
            f"{metric_key_prefix}_samples_per_second": round(len(examples) / seconds, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validation_loss(self, examples: list[Example], objective: Objective | None = None) -> float:
        """Return the mean loss per target; objective: another one than that of the training."""
        self.model.eval()
        # The sum of all losses divided by all targets: a mean of batch means would depend on how examples are batched.
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for block in blocks(examples):
            total += self._summed_loss(block, objective)
        if self.args.world_size > 1:
            distributed.all_reduce(total)
        return total.item() / self.kind.targets(examples)

    def _summed_loss(self, examples: list[Example], objective: Objective | None) -> torch.Tensor | float:
        while True:
            try:
                total = 0.0
                for micro in self._micro_batches(examples):
                    with self.accelerator.autocast():
                        total += self._loss(micro, objective).double().to(self.args.device)
                return total
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
            self._halve(examples)

    @torch.no_grad()
    def example_losses(self) -> tuple[list[float], list[int]]:
        """Return (losses, target tokens) per validation example, in the order of the data; losses are sums in nats."""
        self.model.eval()
        with self.accelerator.autocast():
            if self.kind.coupled:
                losses = [loss for block in blocks(self.eval_dataset) for loss in self.engine.example_losses(block)]
            else:  # one by one, since micro-batches of several give only their sum
                losses = [math.fsum(self._each_loss(example)) for example in self.eval_dataset]
        return losses, [self.kind.targets([example]) for example in self.eval_dataset]

    def _each_loss(self, example: Example) -> list[float]:
        return [self._loss(micro).double().item() for micro in self.engine.micro_batches([example])]
