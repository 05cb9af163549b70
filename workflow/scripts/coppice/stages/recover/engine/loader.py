"""The examples of a training by optimizer steps, in an order that seed and epoch alone decide."""

import math

import torch
from torch.utils.data import DataLoader

ORDERS = 1_000_003  # keeps the orders of neighbouring seeds and epochs apart


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


class StepLoader(DataLoader):
    def set_epoch(self, epoch):
        """Trainer calls this before each epoch."""
        self.batch_sampler.set_epoch(epoch)


def together(examples):
    """A batch as Trainer hands it on: the examples as they are."""
    return {"examples": examples}
