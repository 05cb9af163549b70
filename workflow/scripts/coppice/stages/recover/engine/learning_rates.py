"""Give some parameters of an optimizer a learning rate of their own."""

from collections.abc import Collection, Mapping

import torch
from torch import nn


def split(optimizer: torch.optim.Optimizer, rates: Mapping[float, Collection[nn.Parameter]]) -> None:
    """Move parameters to groups of their own, before the first step and before a schedule is made.

    A schedule multiplies the learning rate of each group, and a checkpoint keeps the groups in their order.

    Args:
        optimizer: whose groups differ in weight decay.
        rates: learning rate -> the parameters that have it.
    """
    if not rates:
        return
    rate_of = {id(parameter): rate for rate, parameters in rates.items() for parameter in parameters}
    for group in list(optimizer.param_groups):
        every = group["params"]
        group["params"] = [parameter for parameter in every if id(parameter) not in rate_of]
        for rate in rates:
            own = [parameter for parameter in every if rate_of.get(id(parameter)) == rate]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
