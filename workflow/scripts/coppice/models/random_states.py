"""The state of torch's random numbers, so that a part of a training can be run again with the same dropout."""

import torch

RandomState = tuple[torch.Tensor, list[torch.Tensor] | None]  # of the CPU, and of the GPUs if there are any


def current() -> RandomState:
    """Return the state from which dropout masks are drawn."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def restore(state: RandomState) -> None:
    """Draw random numbers from `state` on."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
