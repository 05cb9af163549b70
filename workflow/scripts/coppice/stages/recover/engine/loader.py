"""Load the examples of one optimizer step at a time, in an order that depends only on seed and epoch.

The batch is a whole step, not a micro-batch: the engine arranges it into micro-batches itself, so that neither the
token limit nor the number of processes changes which examples a step is trained on.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from coppice.models.kinds import Example

VALIDATION_ROWS = 256  # validation examples that are arranged into micro-batches together
ORDERS = 1_000_003  # seed * ORDERS + epoch: seed 1, epoch 0 must not repeat the order of seed 0, epoch 1


class StepSampler:
    """Yields the indices of each optimizer step's examples, in a new order every epoch."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        """Order `count` examples, `size` of them a step, by `seed` and epoch."""
        self.count, self.size, self.seed, self.epoch = count, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        return math.ceil(self.count / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each step of the chosen epoch."""
        # A separate generator: the order must not depend on how many random numbers dropout has drawn, or a resumed
        # training would see other examples than an uninterrupted one.
        generator = torch.Generator().manual_seed(self.seed * ORDERS + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, self.count, self.size):
            yield order[start : start + self.size]


class StepLoader(DataLoader):
    """A DataLoader that passes the epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`; Trainer calls this before each one."""
        self.batch_sampler.set_epoch(epoch)


def together(examples: list[Example]) -> dict[str, list[Example]]:
    """Return a batch for Trainer: the examples as they are, because the engine pads and arranges them later."""
    return {"examples": examples}


def blocks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Yield validation examples, `VALIDATION_ROWS` at a time."""
    for start in range(0, len(examples), VALIDATION_ROWS):
        yield examples[start : start + VALIDATION_ROWS]
