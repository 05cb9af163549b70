"""Generate answers in batches: rows of about equal length together, with progress in the log and a seed of their own.

The kinds of models that generate text use this; each prepares the inputs of a batch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from coppice.core import logs

if TYPE_CHECKING:
    import torch

    from .kinds import Decoding


def in_batches(
    lengths: Sequence[int], decoding: Decoding, generate: Callable[[list[int]], list[str]], device: torch.device
) -> list[str]:
    """Return the answers to rows, in their order, cut at stop texts and without spaces around them.

    Args:
        lengths: the number of tokens of each row's question. The longest go first, so that a batch that does not fit in
            memory fails at once.
        decoding: how answers are generated. Random draws depend on its seed and on its batch size.
        generate: returns the answers to the rows with some indices.
        device: the model's.
    """
    import torch

    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    size = decoding.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    answers = [""] * len(lengths)
    drawn_on = [device] if device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(drawn_on, enabled=decoding.sample):
        if decoding.sample:
            torch.manual_seed(decoding.seed)
        for batch in logs.progress(batches, "answers", unit="batch"):
            for index, answer in zip(batch, generate(batch), strict=True):
                answers[index] = decoding.cut(answer)
    return answers
