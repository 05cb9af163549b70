"""Batches of a prefix tree through a causal language model: masks, positions, and whether the model takes them."""

import logging

import numpy
import torch

from .. import output_head
from . import trie as tries

logger = logging.getLogger("coppice.prefix_tree")

LONGEST_ROW = {"sdpa": 8192, "eager": 2048}  # eager attention holds [heads, length, length] scores
ATTENTION_RATE = 0.8  # speed of masked attention relative to that of the linear layers


class TreeForward:
    """A causal LM on rows of a prefix tree: its last hidden states, or its logits where it changes them after the head.

    `head` is the output layer, None where logits come out. `crossover` is the row length at which attention takes as
    long as the linear layers, `longest_row` what one row may hold; `tokens_run` counts the tokens of all forward
    passes so far, padding included.
    """

    def __init__(self, model):
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.body, self.head = output_head.parts(model)
        self.masks = TreeMasks(model)
        self.crossover = _crossover(model, self.masks.config)
        self.longest_row = LONGEST_ROW.get(self.masks.attention, 0)
        self.tokens_run = 0

    def __call__(self, trie, batch):
        """[B, T, width] of the `batch` (rows of `trie`), padded to the longest of them."""
        tokens, depth, end = (torch.from_numpy(array).to(self.device) for array in _arrays(trie, batch))
        self.tokens_run += tokens.numel()
        return self.run(tokens, attention_mask=self.masks(depth, end), position_ids=depth)

    def run(self, ids, **options):
        """[B, T, width] of token ids [B, T], with nothing shared: a row sees what stands left of it."""
        if self.head is None:
            return self.model(input_ids=ids, use_cache=False, **options).logits
        return self.body(input_ids=ids, use_cache=False, **options).last_hidden_state

    def usable(self):
        """Whether a small tree gives what its paths give one by one, and no branch sees the tokens of another."""
        if not self.masks.known:
            return False
        exact = all(p.element_size() >= 4 for p in self.model.parameters())  # neither half precision nor quantised
        tolerance = 1e-4 if exact else 3e-2
        top = min(self.model.get_input_embeddings().weight.shape[0], 9)
        stem = [3, 1, 4, 1, 5, 2]
        before = [[t % top for t in path] for path in ([*stem, 7, 2, 6], [*stem, 8, 7], [6, 5, 3, 5, 8])]
        after = [[t % top for t in [*stem, 7, 6, 2]], *before[1:]]
        try:
            first, second = self._states(before), self._states(after)
            plain = [self.run(torch.tensor([path], device=self.device))[0] for path in before]
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            logger.info("the tree mask does not go through the model: %r", error)
            return False
        pairs = [*zip(first, plain, strict=True), *zip(first[1:], second[1:], strict=True)]
        return all(_distance(found, expected) <= tolerance for found, expected in pairs)

    def rows(self, trie, first=0, last=None, limit=None):
        """Nodes `first` to `last` of `trie` as rows of least cost, none longer than `limit` where a cut can help."""
        return tries.rows(trie, min(limit or self.longest_row, self.longest_row), self.crossover, first, last)

    def _states(self, paths):
        trie, nodes = tries.build(paths)
        outputs = self(trie, [tries.Row(0, len(trie), 0)])[0]
        return [outputs[path] for path in nodes]


def _arrays(trie, batch):
    """(token, depth, local end) of each place in the rows of a batch, int64 [B, T]; padding sees itself alone."""
    shape = (len(batch), max(map(len, batch)))
    tokens, depth = numpy.zeros(shape, dtype=numpy.int64), numpy.zeros(shape, dtype=numpy.int64)
    end = numpy.broadcast_to(numpy.arange(1, shape[1] + 1), shape).copy()
    for line, row in enumerate(batch):
        nodes = numpy.concatenate([trie.ancestors(row.start), numpy.arange(row.start, row.stop)])
        tokens[line, : len(nodes)], depth[line, : len(nodes)] = trie.token[nodes], trie.depth[nodes]
        end[line, : len(nodes)] = numpy.minimum(trie.end[nodes], row.stop) - row.start + row.lead
    return tokens, depth, end


class TreeMasks:
    """Attention masks of prefix trees in the form that a model takes: bool for sdpa, additive for eager attention,
    one for each kind of layer where a model mixes full and sliding-window attention. `known` says whether its kinds
    are understood."""

    def __init__(self, model):
        causal = output_head.causal_lm(model)
        self.config = causal.config.get_text_config()
        if self.config._attn_implementation not in ("sdpa", "eager"):
            logger.info("%s attention takes no tree mask: scoring with sdpa", self.config._attn_implementation)
            causal.set_attn_implementation("sdpa")
        self.attention = self.config._attn_implementation
        window = getattr(self.config, "sliding_window", None)
        default = ["sliding_attention" if window else "full_attention"]
        self.kinds = sorted(set(getattr(self.config, "layer_types", None) or default))
        self.windows = {"full_attention": None, "sliding_attention": window}
        self.known = all(kind in self.windows for kind in self.kinds) and self.attention in LONGEST_ROW
        self.dtype = model.get_input_embeddings().weight.dtype

    def __call__(self, depth, end):
        """Mask [B, 1, T, T], or one a kind of layer, from the depth and the local `end` of each node, both [B, T]."""
        place = torch.arange(depth.shape[1], device=depth.device)
        ancestor = (place[None, :] <= place[:, None]) & (place[:, None] < end[:, None, :])
        masks = {kind: self._one(ancestor, depth, self.windows[kind]) for kind in self.kinds}
        return masks if len(masks) > 1 else masks[self.kinds[0]]

    def _one(self, ancestor, depth, window):
        if window is not None:
            ancestor = ancestor & (depth[:, None, :] > depth[:, :, None] - window)
        if self.attention == "sdpa":
            return ancestor[:, None]
        # -inf would make NaN of the rows of padding, a bool mask would be added as 0 and 1
        seen = torch.zeros(ancestor.shape, dtype=self.dtype, device=ancestor.device)
        return seen.masked_fill_(~ancestor, torch.finfo(self.dtype).min)[:, None]


def _crossover(model, config):
    """The row length at which attention takes as long as the linear layers: 2 P against 4 T width operations."""
    weights = sum(p.numel() for p in output_head.causal_lm(model).base_model.parameters())
    weights -= model.get_input_embeddings().weight.numel()
    return max(1.0, ATTENTION_RATE * weights / (2 * config.num_hidden_layers * config.hidden_size))


def _distance(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())
