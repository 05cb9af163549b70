"""Recognize that memory ran out, and keep the random state with which a step can be repeated."""

import torch
from accelerate.utils.memory import should_reduce_batch_size

RandomState = tuple[torch.Tensor, list[torch.Tensor] | None]  # of the CPU, and of the GPUs if there are any


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU or the CPU ran out of memory."""
    # accelerate recognizes most messages, but not cuBLAS's
    own = isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    return own or should_reduce_batch_size(error)


def random_state() -> RandomState:
    """Return the state of torch's random numbers, from which dropout masks are drawn."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def set_random_state(state: RandomState) -> None:
    """Draw random numbers from `state` on."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
