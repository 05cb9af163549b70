"""Run a model block by block, in the memory of one block: forwards while it is pruned, or backwards for gradients.

Forwards, only the hidden states before the current block are kept, in host memory. Each block runs on what the blocks
before it make of the calibration data after they were pruned.

Backwards, the hidden states before each block are kept in host memory. Then, from the last block to the first, each
block runs again with an autograd graph of its own. A device therefore holds the weights, one block's activations and
one block's gradients, however deep the model is. For an 8B Llama in bfloat16 these are, by calculation: 16 GB; under
1 GB (4096 tokens per batch, each with 8 states of width 4096 and 4 of width 14336); and 0.9 GB (218M weights in
float32).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from coppice.core.aliases import Record
from coppice.models.towers import Batch, BlockOutput, Tower


class Gradients(NamedTuple):
    """Gradients of a block's tensors, in float32 or wider.

    Attributes:
        mean: of the mean loss over all targets of all batches.
        squared: the mean over all batches of the squared gradient of a batch's own mean loss; empty unless asked for.
    """

    mean: dict[nn.Parameter, torch.Tensor]
    squared: dict[nn.Parameter, torch.Tensor]


Passes = Sequence[Callable[[], Any]]


@torch.no_grad()
def visit_forwards(tower: Tower, batches: Sequence[Batch], visit: Callable[[int, Passes], None]) -> None:
    """Call `visit(index, passes)` for each block, from the first to the last; it may change the block's weights.

    Each of `passes` runs the block on one batch, as the blocks before it make it after their visits.

    Args:
        tower: of a model in evaluation mode.
        batches: calibration batches of the tower.
        visit: called once per block.
    """
    inputs = [_BlockInputs(tower, batch) for batch in batches]
    for index, block in enumerate(tower.blocks):
        visit(index, [partial(batch.output_of, block, index) for batch in inputs])
        for batch in inputs if index + 1 < len(tower.blocks) else ():
            batch.state = batch.output_of(block, index)


@torch.no_grad()
def losses_without(tower: Tower, batch: Batch) -> torch.Tensor:
    """Return the summed loss of a batch without each block in turn: float64 [blocks].

    What runs before the missing block is the same for all of them and runs once.
    """
    blocks, inputs, befores = tower.blocks, _BlockInputs(tower, batch), []
    for index, block in enumerate(blocks):
        befores.append(inputs.state)
        inputs.state = inputs.output_of(block, index)
    device, losses = next(blocks[-1].parameters()).device, []
    for missing, before in enumerate(befores):
        inputs.state = before
        for index in range(missing + 1, len(blocks)):
            inputs.state = inputs.output_of(blocks[index], index)
        losses.append(float(tower.summed_loss(inputs.state.to(device), batch)))
    return torch.tensor(losses, dtype=torch.float64)


class _BlockInputs:
    """One batch: the hidden state before the current block, in host memory, and the other arguments of every block."""

    def __init__(self, tower: Tower, batch: Batch) -> None:
        self.tower, self.options = tower, dict[int, Record]()
        own = [block.__dict__.get("forward") for block in tower.blocks]  # accelerate replaces it to move inputs
        for index, block in enumerate(tower.blocks):
            block.forward = partial(self._pass_on, index)  # the blocks' arguments are known without running them
        try:
            tower.run(batch)
        finally:
            for block, forward in zip(tower.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _pass_on(self, index: int, *args: object, **kwargs: object) -> BlockOutput:
        state, self.options[index] = _arguments(self.tower.blocks[index], args, kwargs)
        self.state = state.cpu()
        return self.tower.skipped(index, state, self.options[index])

    def output_of(self, block: nn.Module, index: int) -> torch.Tensor:
        """Return the block's output, in host memory."""
        device = next(block.parameters()).device
        return _state(block(self.state.to(device), **self.options[index])).cpu()


def visit_gradients(
    tower: Tower,
    batches: Sequence[Batch],
    tensors_of: Callable[[nn.Module], list[nn.Parameter]],
    visit: Callable[[int, Gradients], None],
    squares: bool = False,
) -> None:
    """Call `visit(index, gradients)` for each block, from the last to the first. The gradients are freed after it.

    Args:
        tower: of a model in evaluation mode in which no parameter requires a gradient.
        batches: calibration batches of the tower.
        tensors_of: returns the parameters of a block whose gradients are wanted.
        visit: called once per block.
        squares: whether the squared gradients are wanted, too; each batch then counts as one example.
    """
    targets = sum(tower.targets(batch) for batch in batches)
    recorded = [_Recorded(tower, batch, targets) for batch in batches]
    blocks = tower.blocks
    for index in range(len(blocks) - 1, -1, -1):
        visit(index, _block_gradients(blocks[index], index, tensors_of(blocks[index]), recorded, squares))


class _Recorded:
    """One batch: the input of every block, in host memory, and the loss gradient at the output of the next block."""

    def __init__(self, tower: Tower, batch: Batch, targets: int) -> None:
        self.inputs, self.options = {}, {}
        blocks = tower.blocks
        hooks = [b.register_forward_pre_hook(self._keep(i), with_kwargs=True) for i, b in enumerate(blocks)]
        hooks.append(blocks[-1].register_forward_hook(self._keep_last))
        try:
            with torch.no_grad():
                tower.run(batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.share = tower.targets(batch) / targets
        self.gradient = self._loss_gradient(tower, batch, targets)

    def _keep(self, index: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Record) -> None:
            state, self.options[index] = _arguments(block, args, kwargs)
            self.inputs[index] = state.cpu()

        return hook

    def _keep_last(self, _block: nn.Module, _args: tuple[torch.Tensor, ...], output: BlockOutput) -> None:
        self.last = _state(output)

    def _loss_gradient(self, tower: Tower, batch: Batch, targets: int) -> torch.Tensor:
        """Return the loss gradient at the last block's output."""
        with torch.enable_grad():
            last = self.last.detach().requires_grad_(True)
            (tower.summed_loss(last, batch) / targets).backward()
        del self.last
        return last.grad.cpu()


def _block_gradients(
    block: nn.Module, index: int, tensors: Sequence[nn.Parameter], recorded: Sequence[_Recorded], squares: bool
) -> Gradients:
    mean = {tensor: torch.zeros_like(tensor, dtype=wide_dtype(tensor)) for tensor in tensors}
    squared = {tensor: torch.zeros_like(total) for tensor, total in mean.items()} if squares else {}
    share = 1.0  # of all targets, in the current batch

    def take(tensor: nn.Parameter) -> None:
        # Autograd would sum the batches in the tensor's own dtype, and in half precision small terms would be lost.
        # Move each gradient into the wide sum as soon as it exists.
        mean[tensor].add_(tensor.grad)
        if squares:
            squared[tensor].add_((tensor.grad.to(mean[tensor].dtype) / share).square_(), alpha=1 / len(recorded))
        tensor.grad = None

    hooks = [tensor.requires_grad_(True).register_post_accumulate_grad_hook(take) for tensor in tensors]
    try:
        for batch in recorded:
            share = batch.share
            with torch.enable_grad():
                state = batch.inputs.pop(index).to(tensors[0].device).requires_grad_(True)
                output = _state(block(state, **batch.options.pop(index)))
                output.backward(batch.gradient.to(output.device, output.dtype))
            batch.gradient = state.grad.cpu()
    finally:
        for hook, tensor in zip(hooks, tensors, strict=True):
            hook.remove()
            tensor.requires_grad_(False)
    return Gradients(mean, squared)


def _arguments(block: nn.Module, args: Sequence[Any], kwargs: Record) -> tuple[torch.Tensor, Record]:
    """Return (hidden state, the other arguments by name) of a call of a block."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    options = dict(zip(names, args, strict=False)) | kwargs
    return options.pop("hidden_states"), options


def _state(output: BlockOutput) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return float32, or the tensor's dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and gradients inside the context, then restore both; no gradients are left on the model."""
    training = model.training
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        model.train(training)
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        model.zero_grad(set_to_none=True)
