"""Train a dual encoder: the contrastive loss of a whole optimizer step, computed in micro-batches.

The loss of a pair depends on all other pairs of its step, so a step cannot be cut into micro-batches that each have a
loss of their own: that would cut the negatives. GradCache (Gao et al. 2021, arXiv:2101.06983) runs the encoders twice.
First it embeds all pairs without a graph and differentiates the loss by the embeddings. Then it runs each micro-batch
again, with the same random numbers, and passes these gradients on. The result is the gradient of the one big batch. A
step that fits into one micro-batch runs once. Several processes exchange their embeddings, so that each sees the
negatives of all.

If a step holds a caption twice, or a picture with several captions, some texts belong to pictures of other pairs. The
loss leaves them out: as negatives they would be wrong, and as further positives they would change the objective with
the number of captions that happen to meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import distributed

from . import packing, random_states
from .kinds import Example, Inputs, MicroBatch

if TYPE_CHECKING:
    from .kinds import LoadedModel
    from .random_states import RandomState


class Encoders:
    """The two encoders of a model, as one function of pairs (a `kinds.Forward`)."""

    def __init__(self, model: LoadedModel) -> None:
        """Take a dual encoder, with an adapter or without."""
        self.model = model
        self.device = model.logit_scale.device

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Return the embeddings [2, n, width] of the texts and of the pictures of n pairs."""
        return torch.stack([self.texts(inputs["input_ids"]), self.pictures(inputs["pixel_values"])])

    def texts(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [n, width], each of length 1, of padded texts [n, tokens]."""
        # Without a mask: CLIP's attention is causal and its padding is to the right, and SigLIP learns from its padding
        return _unit(self.model.get_text_features(input_ids=ids.to(self.device)).pooler_output)

    def pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [n, width], each of length 1, of pictures [n, channels, height, width]."""
        return _unit(self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output)

    def scales(self) -> list[torch.Tensor]:
        """Return the parameters that turn similarities into logits: a factor's logarithm and, in SigLIP, a bias."""
        return [self.model.logit_scale, *([self.model.logit_bias] if hasattr(self.model, "logit_bias") else [])]


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


def belonging(keys: torch.Tensor) -> torch.Tensor:
    """Return a bool mask [n, n]: whether text i belongs to the picture of another pair j.

    That is so if some pair of the batch holds this text and this picture.

    Args:
        keys: of the text and the picture of each pair, LongTensor [n, 2].
    """
    texts, pictures = ((keys[:, None, side] == keys[None, :, side]).float() for side in (0, 1))
    return (texts @ pictures > 0).fill_diagonal_(False)


def losses(embeddings: torch.Tensor, keys: torch.Tensor, scales: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the loss of each pair [n], whose mean is that of the batch.

    With a factor alone it is CLIP's: half the cross-entropy of the text among all pictures and half that of the
    picture among all texts. With a bias it is SigLIP's: the summed binary cross-entropy of the text and each picture.

    Args:
        embeddings: of texts and pictures [2, n, width], each of length 1.
        keys: of texts and pictures (see `belonging`).
        scales: as `Encoders.scales` returns them.
    """
    texts, pictures = embeddings
    with torch.autocast(embeddings.device.type, enabled=False):  # it would round the similarities
        logits, ignored = texts @ pictures.T * scales[0].exp(), belonging(keys.to(embeddings.device))
        if len(scales) > 1:
            sign = 2 * torch.eye(len(texts), device=logits.device, dtype=logits.dtype) - 1
            return F.softplus(-sign * (logits + scales[1])).masked_fill(ignored, 0).sum(1)
        logits = logits.masked_fill(ignored, -torch.inf)
        return (logits.logsumexp(0) + logits.logsumexp(1)) / 2 - logits.diagonal()


@dataclass(frozen=True)
class Pairs(MicroBatch):
    """Some pairs of a step. `run` returns their embeddings [2, n, width], and `targets` are their keys [n, 2].

    Attributes:
        loss: the summed loss of the pairs, a scalar; None if they are the whole step, so that running them gives it.
        gradients: those of the step's summed loss by the embeddings [2, n, width]; None if none are wanted.
        scales: those by `Encoders.scales`; empty except in one micro-batch of a step.
    """

    loss: torch.Tensor | None = None
    gradients: torch.Tensor | None = None
    scales: Sequence[torch.Tensor] = ()


class Engine:
    """Computes the contrastive loss of the pairs of a step (see `kinds.Engine`).

    Args:
        model: a dual encoder, with or without an adapter.
        token_limit: the most tokens and patches in a micro-batch; a pair that has more runs alone.
    """

    arrangement = "pairs"

    def __init__(self, model: LoadedModel, token_limit: int) -> None:
        """Take the limit as it is, on a CPU too: smaller micro-batches would need a second run of the encoders."""
        self.forward, self.token_limit, self.warnings, self.gathers = Encoders(model), token_limit, [], False

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[Pairs]:
        """Yield the micro-batches of a step. If the engine gathers, all processes call this, even without examples."""
        groups = packing.by_length(examples, self.token_limit, length) if examples else []
        parts = [_Part(group) for group in groups]
        if len(parts) == 1 and not self.gathers and torch.is_grad_enabled():
            yield parts[0].pairs()
            return
        embedded = [part.embedded(self.forward) for part in parts]
        found, scales = self._differentiated(embedded, [part.keys for part in parts])
        for part, (loss, gradients) in zip(parts, found, strict=True):
            yield part.pairs(loss=loss, gradients=gradients, scales=scales)
            scales = ()

    def summed_loss(self, micro: Pairs) -> torch.Tensor:
        """Return the summed loss of a micro-batch's pairs.

        The gradients of all micro-batches of a step add up to that of the step's summed loss.
        """
        if micro.loss is None:
            return losses(micro.run(self.forward), micro.targets, self.forward.scales()).sum()
        if micro.gradients is None:
            return micro.loss
        through = (micro.run(self.forward) * micro.gradients).sum()
        for scale, gradient in zip(self.forward.scales(), micro.scales, strict=False):
            through = through + (scale * gradient).sum()
        return micro.loss + (through - through.detach())  # the value of the first, the gradient of the second

    @torch.no_grad()
    def example_losses(self, examples: Sequence[Example]) -> list[float]:
        """Return the loss of each pair among these examples, in their order."""
        groups = packing.by_length(range(len(examples)), self.token_limit, lambda place: length(examples[place]))
        order, parts = [], []
        for group in groups:
            order += group
            parts.append(_Part([examples[place] for place in group]))
        embeddings = torch.cat([part.embedded(self.forward) for part in parts], dim=1)
        each = losses(embeddings, torch.cat([part.keys for part in parts]), self.forward.scales())
        return each.cpu()[torch.tensor(order).argsort()].tolist()

    def _differentiated(
        self, embedded: Sequence[torch.Tensor], keys: Sequence[torch.Tensor]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor | None]], Sequence[torch.Tensor]]:
        """Return (summed loss, gradients by the embeddings) of each micro-batch, and the gradients by the scales.

        Args:
            embedded: the embeddings [2, n, width] of each micro-batch of this process.
            keys: of the texts and pictures of each, [n, 2].
        """
        sizes, wanted = [len(part) for part in keys], torch.is_grad_enabled()
        every, every_key, first = self._everyone(embedded, keys)
        here = slice(first, first + sum(sizes))
        scales = [scale.detach().requires_grad_(wanted) for scale in self.forward.scales()]
        each = losses(every.requires_grad_(wanted), every_key, scales)
        sums = [part.sum() for part in each.detach()[here].split(sizes)] if sizes else []
        if not wanted:
            return [(part, None) for part in sums], ()
        by_embeddings, *by_scales = torch.autograd.grad(each.sum(), [every, *scales])
        parts = by_embeddings[:, here].split(sizes, dim=1) if sizes else []
        # the gradients by the scales are those of the whole step, and the trainer sums those of all processes
        return list(zip(sums, parts, strict=True)), () if first else by_scales

    def _everyone(
        self, embedded: Sequence[torch.Tensor], keys: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the embeddings and keys of all processes' pairs, and the place of the first pair of this process."""
        own = [(torch.cat(list(embedded), dim=1), torch.cat(list(keys)))] if keys else []
        if not self.gathers:
            return *own[0], 0
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, [tuple(tensor.cpu() for tensor in pair) for pair in own])
        before = sum(len(keys) for pairs in found[: distributed.get_rank()] for _, keys in pairs)
        embeddings, every_key = zip(*(pair for pairs in found for pair in pairs), strict=True)
        return torch.cat(embeddings, dim=1).to(self.forward.device), torch.cat(every_key), before


class _Part:
    """The pairs of a micro-batch. Their pictures are decoded once and stay in the host's memory for both runs."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.inputs, self.keys = inputs_of(examples), torch.tensor([example["keys"] for example in examples])
        self.tokens = sum(map(length, examples))
        self.state: RandomState | None = None

    @torch.no_grad()
    def embedded(self, forward: Encoders) -> torch.Tensor:
        """Return the embeddings [2, n, width] without a graph, and keep the random numbers of this run."""
        self.state = random_states.current()
        return forward(self.inputs)

    def pairs(
        self,
        loss: torch.Tensor | None = None,
        gradients: torch.Tensor | None = None,
        scales: Sequence[torch.Tensor] = (),
    ) -> Pairs:
        """Return the micro-batch. Its run draws the random numbers of the first run, if there was one."""
        return Pairs(self._run, self.keys, self.tokens, loss, gradients, scales)

    def _run(self, forward: Encoders) -> torch.Tensor:
        if self.state is not None:
            random_states.restore(self.state)
        return forward(self.inputs)


def length(example: Example) -> int:
    """Return the tokens of a pair's text and the patches of its picture."""
    return len(example["input_ids"]) + example["patches"]


def inputs_of(examples: Sequence[Example]) -> Inputs:
    """Return the inputs of some pairs, on the CPU."""
    pixels = torch.cat([example["pixels"]() for example in examples])
    return {"input_ids": padded([example["input_ids"] for example in examples]), "pixel_values": pixels}


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return texts as a LongTensor [n, tokens], padded to the right by their last token, which is the end of text.

    CLIP reads a text's embedding at its first end-of-text token. SigLIP's texts have one length and are not padded.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
