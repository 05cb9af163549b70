"""Train an image-text model: sort the examples of a step by length, and pad those of a micro-batch to the right.

Causal attention never looks at padding, so no mask is needed. Pictures are read when a micro-batch runs. The output
layer is applied at target positions only, and the gradient is that of the examples run one by one: the loss is summed
over target tokens and divided by the number of target tokens in the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from coppice.core.errors import CoppiceError

from . import output_head, packing, sight
from .kinds import Example, Inputs, MicroBatch
from .text_examples import IGNORED
from .token_engine import TokenEngine

if TYPE_CHECKING:
    from .kinds import LoadedModel


class Forward:
    """Runs an image-text model up to its output layer, which is `head`; None if the model changes logits after it."""

    def __init__(self, model: LoadedModel) -> None:
        """Take a model, with or without an adapter."""
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.body, self.head = output_head.parts(model)

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Return the states [B, T, width]; without a head, the logits."""
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if self.head is None:
            return self.model(**inputs, use_cache=False).logits
        return self.body(**inputs, use_cache=False).last_hidden_state


class Engine(TokenEngine):
    """Computes the summed loss of examples {input_ids, labels, seen}, micro-batch by micro-batch; see `kinds.Engine`.

    Args:
        model: an image-text model, with or without an adapter.
        token_limit: the most tokens in a micro-batch, those of pictures included; a longer example runs alone.
        arrangement: "sorted" or None.
    """

    arrangement = "sorted"

    def __init__(self, model: LoadedModel, token_limit: int, arrangement: str | None = None) -> None:
        """Find the output layer, and fit the limit to the device."""
        if arrangement == "tree":
            raise CoppiceError(
                "finetune.arrangement: examples with pictures have positions in two dimensions, which a prefix tree "
                "does not have. Set it to sorted or null."
            )
        super().__init__(Forward(model), token_limit)

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        """Yield micro-batches of examples; each target token is in exactly one of them."""
        for group in packing.by_length(examples, self.token_limit):
            ids, labels = padded(group)
            # a token is predicted from those before it, so labels are shifted by one
            wanted = labels[:, 1:] != IGNORED

            def states(forward: Forward, group: list[Example] = group, wanted: torch.Tensor = wanted) -> torch.Tensor:
                outputs = forward(batch(group))[:, :-1]
                return outputs[wanted.to(outputs.device)]

            yield MicroBatch(states, labels[:, 1:][wanted], ids.numel())


def batch(examples: Sequence[Example]) -> Inputs:
    """Return the model's inputs for examples: token ids [B, T], and what belongs to their pictures."""
    ids, _ = padded(examples)
    return {"input_ids": ids} | sight.inputs([example.get("seen") for example in examples], ids)


def padded(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels of examples, [B, T] each, padded to the right."""
    marks = {example["seen"].token for example in examples if example.get("seen")}
    # any token will do, but not the one that says that there is a picture
    pad = 1 if 0 in marks else 0
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor(example["labels"]) for example in examples]
    fill = torch.nn.utils.rnn.pad_sequence
    return fill(rows, True, pad), fill(labels, True, IGNORED)
