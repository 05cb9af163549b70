"""Run batches of a prefix tree through a causal language model, and find out whether the model can take them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import torch

from .. import library_compat, output_head
from ..kinds import Fallback
from . import architectures, probe
from . import trie as tries
from .trie import Row, Trie

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..kinds import LoadedModel

logger = logging.getLogger("coppice.prefix_tree")

LONGEST_ROW = {"sdpa": 8192, "eager": 2048}  # in nodes; eager attention holds [heads, length, length] scores
ATTENTION_RATE = 0.8  # speed of masked attention relative to that of the linear layers


class TreeForward:
    """Run a causal LM on rows of a prefix tree, and return its last hidden states.

    If the model changes its logits after the head, return the logits instead.

    Attributes:
        head: the output layer; None if logits are returned.
        masks: makes the attention masks.
        crossover: the row length at which attention takes as long as the linear layers.
        longest_row: the most nodes that a row may hold.
        tokens_run: tokens of all forward passes so far, padding included.
        known: what is known of the model from its configuration.
    """

    def __init__(self, model: LoadedModel) -> None:
        """Take a causal language model, with or without an adapter."""
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.body, self.head = output_head.parts(model)
        self.masks = TreeMasks(model)
        self.known = architectures.knowledge(output_head.causal_lm(model))
        self.crossover = _crossover(model, self.masks.config)
        self.longest_row = LONGEST_ROW.get(self.masks.attention, 0)
        self.tokens_run = 0

    def __call__(self, trie: Trie, batch: Sequence[Row], reach: int = 0) -> torch.Tensor:
        """Return [B, T, width] for the `batch` (rows of `trie`), padded to its longest row.

        reach: the least number of positions in the pass, from `groups`.
        """
        tokens, depth, end = (torch.from_numpy(array).to(self.device) for array in _arrays(trie, batch, reach))
        self.tokens_run += tokens.numel()
        # Positions are depths, not places in the row: a token then has the position that it has in its own sequence.
        # Without them, or without the mask, the results are wrong and no error is raised.
        return self.run(tokens, attention_mask=self.masks(depth, end), position_ids=depth)

    def run(self, ids: torch.Tensor, **options: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Return [B, T, width] for token ids [B, T]; without a mask, each token sees all tokens left of it."""
        if self.known.dynamic:
            library_compat.forget_lengths(self.model)
        # nothing is generated after these tokens, so a KV cache would only take memory
        if self.head is None:
            return self.model(input_ids=ids, use_cache=False, **options).logits
        # only the body: the full logits would be by far the largest tensor, and few of them are needed
        return self.body(input_ids=ids, use_cache=False, **options).last_hidden_state

    def alone(self, text: list[int]) -> torch.Tensor:
        """Return [T, width] for one text in a pass of its own."""
        return self.run(torch.tensor([text], device=self.device))[0]

    def states(self, texts: list[list[int]]) -> list[torch.Tensor]:
        """Return [T, width] for each text, from a prefix tree in a single row for each group of texts."""
        found: list[torch.Tensor | None] = [None] * len(texts)
        for members, reach in self.groups([len(text) for text in texts]):
            trie, paths = tries.build([texts[index] for index in members])
            outputs = self(trie, [tries.Row(0, len(trie), 0)], reach)[0]  # the whole tree, without leading ancestors
            for index, path in zip(members, paths, strict=True):
                found[index] = outputs[torch.from_numpy(path).to(outputs.device)]
        return found

    def groups(self, lengths: Sequence[int]) -> list[tuple[list[int], int]]:
        """Return the groups of texts that may share a pass, as (indices into `lengths`, reach of the passes).

        longrope has one set of frequencies for texts up to a number of tokens and another for longer ones, and takes
        it from the largest position of the pass. So a pass of long texts must hold a position beyond that number, even
        if the row was cut before it: `reach` is the number of positions that it must have.
        """
        boundary = self.known.boundary
        if boundary is None:
            return [(list(range(len(lengths))), 0)] if lengths else []
        short = [index for index, length in enumerate(lengths) if length <= boundary]
        long = [index for index, length in enumerate(lengths) if length > boundary]
        return [group for group in ((short, 0), (long, boundary + 1)) if group[0]]

    def fallback(self) -> Fallback | None:
        """Return why the tree is not exact for this model, or None if it is. Some passes find out, so ask once.

        If it is exact, no row may exceed what was probed.
        """
        training = self.model.training
        self.model.eval()  # two passes are compared, which dropout would make different
        found = probe.judge(self, self.known)
        self.model.train(training)
        if found.obstacle:
            return Fallback(found.obstacle, found.alone, lambda: library_compat.forget_lengths(self.model))
        if found.longest_row:
            self.longest_row = min(self.longest_row, found.longest_row)
        return None

    def rows(self, trie: Trie, first: int = 0, last: int | None = None, limit: int | None = None) -> list[Row]:
        """Cut nodes `first` to `last` of `trie` into the rows of lowest cost; see `trie.rows`.

        No row exceeds `limit` or the longest possible row, unless no cut can shorten it.
        """
        return tries.rows(trie, min(limit or self.longest_row, self.longest_row), self.crossover, first, last)


def _arrays(trie: Trie, batch: Sequence[Row], reach: int = 0) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Return (token, depth, local end) of each place in the rows of a batch, int64 [B, T].

    The local end of a place is the place right after its last descendant in the row. With a `reach`, one more place at
    the end of each row has the depth `reach` - 1.
    """
    shape = (len(batch), max(map(len, batch)) + bool(reach))
    tokens, depth = numpy.zeros(shape, dtype=numpy.int64), numpy.zeros(shape, dtype=numpy.int64)
    # a padding token attends only to itself: attention over no token at all may give NaN
    end = numpy.broadcast_to(numpy.arange(1, shape[1] + 1), shape).copy()  # a broadcast view is read-only
    for line, row in enumerate(batch):
        # a row cut off inside the tree repeats the ancestors of its first node, which its nodes attend to
        nodes = numpy.concatenate([trie.ancestors(row.start), numpy.arange(row.start, row.stop)])
        tokens[line, : len(nodes)], depth[line, : len(nodes)] = trie.token[nodes], trie.depth[nodes]
        # from node to place: node `row.start` lies at place `row.lead`; subtrees may go on beyond the row
        end[line, : len(nodes)] = numpy.minimum(trie.end[nodes], row.stop) - row.start + row.lead
    if reach:
        depth[:, -1] = reach - 1
    return tokens, depth, end


class TreeMasks:
    """Make attention masks of prefix trees in the form that a model takes.

    The form is bool for sdpa and additive for eager attention. A model that mixes full and sliding-window attention
    gets one mask for each kind of layer. `obstacle` says which kind of layer or attention is not supported; it is "" if
    all are.
    """

    def __init__(self, model: LoadedModel) -> None:
        """Read the attention of a causal language model; flash attention is replaced by sdpa."""
        causal = output_head.causal_lm(model)
        self.config = causal.config.get_text_config()
        if library_compat.attention(self.config) not in ("sdpa", "eager"):  # flash attention takes no arbitrary mask
            logger.info("%s attention takes no tree mask: using sdpa", library_compat.attention(self.config))
            causal.set_attn_implementation("sdpa")
        self.attention = library_compat.attention(self.config)
        window = getattr(self.config, "sliding_window", None) or None
        # without `layer_types`, all layers are alike: Mistral's have a window, Llama's have none
        default = ["sliding_attention" if window else "full_attention"]
        self.kinds = sorted(set(getattr(self.config, "layer_types", None) or default))
        self.windows = {kind: window if kind == "sliding_attention" else None for kind in self.kinds}
        other = sorted(set(self.kinds) - set(architectures.MASKED_LAYERS))
        self.obstacle, self.unknown = "", bool(set(other) - {"chunked_attention"})
        if other:
            self.obstacle = f"no mask of a prefix tree is known for its layers of the kind {', '.join(other)}"
        elif self.attention not in LONGEST_ROW:
            self.obstacle = f"{self.attention} attention takes no mask of a prefix tree"
        self.dtype = model.get_input_embeddings().weight.dtype

    def __call__(self, depth: torch.Tensor, end: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the mask [B, 1, T, T], or one for each kind of layer, from the places' depth and local end, [B, T]."""
        place = torch.arange(depth.shape[1], device=depth.device)
        # in depth-first order, j is i or an ancestor of i if j <= i and i comes before the end of j's subtree
        ancestor = (place[None, :] <= place[:, None]) & (place[:, None] < end[:, None, :])
        masks = {kind: self._one(ancestor, depth, self.windows[kind]) for kind in self.kinds}
        # a model whose layers are all of one kind takes the mask itself, one that mixes kinds a dict
        return masks if len(masks) > 1 else masks[self.kinds[0]]

    def _one(self, ancestor: torch.Tensor, depth: torch.Tensor, window: int | None) -> torch.Tensor:
        # A 4D mask replaces the model's own, sliding window included. The window counts depths: the distance in the row
        # also counts the nodes of other branches.
        if window is not None:
            ancestor = ancestor & (depth[:, None, :] > depth[:, :, None] - window)
        if self.attention == "sdpa":
            return ancestor[:, None]
        # Eager attention adds the mask to its scores. It would add a bool mask as 0 and 1, silently, and -inf gives NaN
        # in rows of padding; the smallest finite number of the scores' dtype does neither.
        seen = torch.zeros(ancestor.shape, dtype=self.dtype, device=ancestor.device)
        return seen.masked_fill_(~ancestor, torch.finfo(self.dtype).min)[:, None]


def _crossover(model: LoadedModel, config: PretrainedConfig) -> float:
    """Return the row length T at which attention takes as long as the linear layers.

    A token takes 2 P operations in linear layers with P weights, and 4 T width in the attention of each layer.
    """
    weights = sum(p.numel() for p in output_head.causal_lm(model).base_model.parameters())
    embedding = model.get_input_embeddings().weight
    weights -= embedding.numel()  # looking up an embedding multiplies nothing
    layers = getattr(config, "num_hidden_layers", None) or 1
    return max(1.0, ATTENTION_RATE * weights / (2 * layers * embedding.shape[1]))
