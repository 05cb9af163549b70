"""Recognize that memory ran out."""

import torch
from accelerate.utils.memory import should_reduce_batch_size


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU or the CPU ran out of memory."""
    # accelerate recognizes most messages, but not cuBLAS's
    own = isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    return own or should_reduce_batch_size(error)
