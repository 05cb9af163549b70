"""Sums over the inputs of linear layers: squares of each column, and the Hessians of the layers' output errors.

Layers that are called one after another with the same tensor (queries, keys and values; gate and up) share one sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from . import blockwise


def square_sums(linears: Sequence[nn.Linear], passes: Iterable[Callable[[], None]]) -> dict[nn.Linear, torch.Tensor]:
    """Return the sum of each input column's squares over all calls of the layer: layer -> float64 [in_features].

    Args:
        linears: layers that the passes call.
        passes: functions that run the layers, each on one batch.
    """
    groups = _Sums(linears, lambda rows: rows.square().sum(0).double()).over(passes)
    return {linear: total for total, group in groups for linear in group}


def hessians(
    linears: Sequence[nn.Linear], passes: Iterable[Callable[[], None]]
) -> list[tuple[torch.Tensor, list[nn.Linear]]]:
    """Return X^T X with the layers that it belongs to, X being all inputs: ([in_features, in_features], layers).

    This is the Hessian of a layer's squared output error but for a factor, on which SparseGPT does not depend.

    Args:
        linears: layers that the passes call.
        passes: functions that run the layers, each on one batch.
    """
    return _Sums(linears, lambda rows: rows.T @ rows).over(passes)


class _Complete(Exception):
    """The inputs of all layers are known: what is left of a pass need not be computed."""


class _Sums:
    """Sums `reduce(inputs)` over all calls. `reduce` gets inputs [tokens, in_features] in float32 or wider."""

    def __init__(self, linears: Sequence[nn.Linear], reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.linears, self.reduce = linears, reduce
        self.sums: dict[nn.Linear, torch.Tensor] = {}
        self.owners: dict[nn.Linear, nn.Linear] = {}  # layer -> the first of the layers that share its inputs
        self.called: list[nn.Linear] = []  # in this pass, in their order
        self.latest: torch.Tensor | None = None

    def over(self, passes: Iterable[Callable[[], None]]) -> list[tuple[torch.Tensor, list[nn.Linear]]]:
        """Run the passes and return each sum with the layers that it belongs to."""
        hooks = [linear.register_forward_pre_hook(self._add) for linear in self.linears]
        try:
            for one in passes:
                self.called.clear()
                try:
                    one()
                except _Complete:
                    continue
        finally:
            for hook in hooks:
                hook.remove()
        groups: dict[nn.Linear, list[nn.Linear]] = {}
        for linear in self.linears:
            groups.setdefault(self.owners[linear], []).append(linear)
        return [(self.sums[owner], group) for owner, group in groups.items()]

    def _add(self, linear: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
        if args[0] is self.latest:
            self.owners[linear] = self.owners[self.called[-1]]
        else:
            self.owners[linear], self.latest = linear, args[0]
            rows = args[0].flatten(0, -2)
            term = self.reduce(rows.to(blockwise.wide_dtype(rows)))
            self.sums[linear] = self.sums[linear].add_(term) if linear in self.sums else term
        self.called.append(linear)
        if len(self.called) == len(self.linears):
            raise _Complete
