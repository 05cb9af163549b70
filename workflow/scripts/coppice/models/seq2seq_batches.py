"""Train an encoder-decoder: sort the examples of a step by length, and pad sources and targets of a micro-batch.

The encoder gets a mask of the padding. The decoder needs none, because padding is to the right of every target token.
The output layer is applied to target tokens only, and the gradient is that of the examples run one by one: the loss is
summed over target tokens and divided by the number of target tokens in the whole step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from coppice.core.errors import CoppiceError

from . import output_head
from .kinds import Example, Inputs, MicroBatch
from .text_examples import IGNORED
from .token_engine import TokenEngine

if TYPE_CHECKING:
    from .kinds import LoadedModel

logger = logging.getLogger("coppice.finetuning")


class Forward:
    """Runs an encoder-decoder up to its output layer, which is `head`; None if the model changes logits after it."""

    def __init__(self, model: LoadedModel) -> None:
        """Find out, from a few tokens, what comes between the decoder and the logits."""
        self.model, self.plain = model, output_head.causal_lm(model)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.head, self.scale = self._head()

    def _head(self) -> tuple[torch.nn.Linear | None, float]:
        """Return (output layer, factor of the states before it)."""
        training, head = self.model.training, self.plain.get_output_embeddings()
        self.model.eval()  # dropout would make the two results differ
        ids = torch.arange(1, 5, device=self.device)[None]  # every vocabulary has these
        probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
        try:
            with torch.no_grad():
                expected = self.model(**probe, use_cache=False).logits.float()
                states = self._states(probe)
                # T5 scales its states if it shares the weights of embedding and output layer
                for scale in (1.0, states.shape[-1] ** -0.5):
                    found = head(states * scale).float()
                    if (expected - found).abs().max() <= 1e-5 * expected.abs().max():
                        return head, scale
        finally:
            self.model.train(training)
        logger.warning("%s changes its logits after the output layer: computing full logits", type(self.plain).__name__)
        return None, 1.0

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Return the states [B, T, width] for ids, mask and decoder_input_ids; without a head, the logits."""
        if self.head is None:
            return self.model(**inputs, use_cache=False).logits
        return self._states(inputs) * self.scale

    def _states(self, inputs: Inputs) -> torch.Tensor:
        mask = inputs["attention_mask"]
        memory = self.plain.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        return self.plain.get_decoder()(
            input_ids=inputs["decoder_input_ids"],
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state


class Engine(TokenEngine):
    """Computes the summed loss of examples {input_ids, labels}, micro-batch by micro-batch; see `kinds.Engine`.

    Args:
        model: an encoder-decoder, with or without an adapter.
        token_limit: the most tokens in a micro-batch, of sources and targets; an example that is longer runs alone.
        arrangement: "sorted" or None.
    """

    arrangement = "sorted"

    def __init__(self, model: LoadedModel, token_limit: int, arrangement: str | None = None) -> None:
        """Find the output layer, and fit the limit to the device."""
        if arrangement == "tree":
            raise CoppiceError(
                "finetune.arrangement: a prefix tree is for models that read from left to right, and an encoder reads "
                "in both directions. Set it to sorted or null."
            )
        super().__init__(Forward(model), token_limit)

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        """Yield micro-batches of examples; each target token is in exactly one of them."""
        for group in _by_length(examples, self.token_limit):
            inputs = padded(group)
            labels = inputs.pop("labels")
            wanted = labels != IGNORED
            inputs["decoder_input_ids"] = self.forward.plain.prepare_decoder_input_ids_from_labels(labels)

            def states(forward: Forward, inputs: Inputs = inputs, wanted: torch.Tensor = wanted) -> torch.Tensor:
                outputs = forward({name: tensor.to(forward.device) for name, tensor in inputs.items()})
                return outputs[wanted.to(outputs.device)]

            yield MicroBatch(states, labels[wanted], inputs["input_ids"].numel() + labels.numel())


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Return {input_ids, attention_mask, labels} of examples, each [B, T] and padded to the right."""
    sources = [torch.tensor(example["input_ids"]) for example in examples]
    targets = [torch.tensor(example["labels"]) for example in examples]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(sources, batch_first=True),  # masked padding may be any token
        "attention_mask": pad([torch.ones_like(source) for source in sources], batch_first=True),
        "labels": pad(targets, batch_first=True, padding_value=IGNORED),
    }


def _by_length(examples: Iterable[Example], limit: int) -> Iterator[list[Example]]:
    """Yield the examples in order of length, in groups of at most `limit` tokens, padding included."""
    group: list[Example] = []
    longest = (0, 0)
    for example in sorted(examples, key=sort_key):
        raised = max(longest[0], len(example["input_ids"])), max(longest[1], len(example["labels"]))
        if group and (len(group) + 1) * sum(raised) > limit:
            yield group
            group, raised = [], (len(example["input_ids"]), len(example["labels"]))
        group.append(example)
        longest = raised
    if group:
        yield group


def sort_key(example: Example) -> list[int]:
    """Return the lengths by which neighbors need little padding."""
    return [len(example["input_ids"]), len(example["labels"])]
