"""Rows of a prefix tree through a model: masks, positions, batches by a token budget, and the scores that were asked.

A batch is rows of nearly equal length, with a 4D attention mask that lets a token see its ancestors alone, and with
depths for positions. The last hidden states are kept where a token is predicted and go through the output layer some
hundred at a time.
"""

import logging
from contextlib import contextmanager

import numpy
import torch

from .. import logs, output_layer
from ..errors import CoppiceError
from . import trie as tries

logger = logging.getLogger("coppice.zero_shot")

HEAD_ROWS = 1024  # hidden states that go through the output layer together
CPU_TOKENS = 512  # tokens a batch and thread, up to GPU_TOKENS; measured: more gains nothing
GPU_TOKENS = 16384
LONGEST_ROW = {"sdpa": 8192, "eager": 2048}  # eager attention holds [heads, length, length] scores
LOGITS_BYTES = 2**30  # of full logits, for models that change them after the head
ATTENTION_RATE = 0.8  # speed of masked attention relative to that of the linear layers


class Packer:
    """Scores continuations under a causal LM, computing once what they have in common.

    `budget` is the number of tokens a batch, `tokens_run` that of all forward passes so far, padding included.
    """

    def __init__(self, model, autocast_dtype=None):
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.device = model.get_input_embeddings().weight.device
        self.body, self.head = output_layer.parts(model)
        self.masks = TreeMasks(model)
        self.crossover = _crossover(model, self.masks.config)
        self.budget = self._token_budget()
        self.tokens_run = 0

    def usable(self):
        """Whether a small tree gives what its paths give one by one, and no branch sees the tokens of another."""
        if not self.masks.known:
            return False
        tolerance = 1e-4 if next(self.model.parameters()).dtype == torch.float32 else 3e-2
        top = min(self.model.get_input_embeddings().weight.shape[0], 9)
        stem = [3, 1, 4, 1, 5, 2]
        before = [[t % top for t in path] for path in ([*stem, 7, 2, 6], [*stem, 8, 7], [6, 5, 3, 5, 8])]
        after = [[t % top for t in [*stem, 7, 6, 2]], *before[1:]]
        try:
            with self._inference():
                first, second = self._states(before), self._states(after)
                plain = [self._plain_states(path) for path in before]
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            logger.info("the tree mask does not go through the model: %r", error)
            return False
        pairs = [*zip(first, plain, strict=True), *zip(first[1:], second[1:], strict=True)]
        return all(_distance(found, expected) <= tolerance for found, expected in pairs)

    def score(self, requests, label="zero-shot scoring", quiet=False):
        """(log-likelihood, is the greedy continuation) of each request (input ids, continuation ids), in order.

        The input ids are the context and the continuation without its last token, already cut to the model's length;
        the last len(continuation) of them predict the continuation. None may be empty.
        """
        trie, paths = tries.build([inputs for inputs, _ in requests])
        wanted = _Wanted(paths, [continuation for _, continuation in requests])
        rows = self._rows(trie, LONGEST_ROW[self.masks.attention])
        with self._inference():
            done = self._run(trie, rows, wanted)
            for _ in done if quiet else logs.progress(done, label, total=len(rows), unit="row"):
                pass
        return wanted.results()

    @contextmanager
    def _inference(self):
        enabled = self.autocast_dtype is not None
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled):
            yield

    def _token_budget(self):
        if self.device.type != "cuda":
            budget = min(GPU_TOKENS, CPU_TOKENS * torch.get_num_threads())
        else:
            free, _ = torch.cuda.mem_get_info(self.device)
            config = self.masks.config
            wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
            budget = min(GPU_TOKENS, free // 2 // (4 * (8 * config.hidden_size + 4 * wide)))
        if self.head is None:
            budget = min(budget, LOGITS_BYTES // (4 * self.masks.config.vocab_size))
        return max(1, int(budget))

    def _rows(self, trie, limit, first=0, last=None):
        return tries.rows(trie, limit, self.crossover, first, last)

    def _run(self, trie, rows, wanted):
        """Score everything that is `wanted` at the nodes of `rows`, and yield each row that is done."""
        pending = tries.batches(rows, self.budget)[::-1]  # the longest last, and run first: memory runs out at once
        states, slices = [], []
        while pending:
            batch = pending.pop()
            hidden = self._wanted_states(trie, batch, wanted)
            if hidden is None:
                smaller = self._smaller(trie, batch)
                left = [row for other in pending for row in other]
                pending = tries.batches(left + smaller, self.budget)[::-1]
                continue
            states.append(hidden)
            slices.extend(map(wanted.slice_of, batch))
            if not pending or sum(map(len, states)) >= HEAD_ROWS or self.head is None:
                wanted.score(self.head, torch.cat(states), slices)
                states, slices = [], []
            yield from batch

    def _smaller(self, trie, rows):
        """The rows of a batch that did not fit in memory, for half the token budget."""
        torch.cuda.empty_cache()
        length = sum(map(len, rows))
        self.budget = max(1, min(self.budget, length) // 2)
        cut = [piece for row in rows for piece in self._rows(trie, self.budget, row.start, row.stop)]
        if len(rows) == 1 and len(cut) == 1:
            raise CoppiceError(f"a single request of {length} tokens does not fit in the device's memory")
        logger.warning("out of memory: going on with %d tokens a batch", self.budget)
        return cut

    def _wanted_states(self, trie, batch, wanted):
        """What the model gives at the wanted nodes of a batch [N, width], or None where memory does not suffice."""
        nodes = [wanted.nodes[wanted.slice_of(row)] for row in batch]
        line = numpy.repeat(numpy.arange(len(batch)), [len(found) for found in nodes])
        place = numpy.concatenate([found - row.start + row.lead for row, found in zip(batch, nodes, strict=True)])
        try:
            outputs = self._forward(trie, batch)
        except torch.OutOfMemoryError:
            return None
        return outputs[torch.from_numpy(line).to(outputs.device), torch.from_numpy(place).to(outputs.device)]

    def _forward(self, trie, batch):
        """Last hidden states (or logits) [B, T, width] of rows, padded to the longest of them."""
        shape = (len(batch), max(map(len, batch)))
        tokens, depth = numpy.zeros(shape, dtype=numpy.int64), numpy.zeros(shape, dtype=numpy.int64)
        end = numpy.broadcast_to(numpy.arange(1, shape[1] + 1), shape).copy()  # padding sees itself alone
        for line, row in enumerate(batch):
            nodes = numpy.concatenate([trie.ancestors(row.start), numpy.arange(row.start, row.stop)])
            tokens[line, : len(nodes)], depth[line, : len(nodes)] = trie.token[nodes], trie.depth[nodes]
            end[line, : len(nodes)] = numpy.minimum(trie.end[nodes], row.stop) - row.start + row.lead
        self.tokens_run += tokens.size
        tokens, depth, end = (torch.from_numpy(array).to(self.device) for array in (tokens, depth, end))
        return self._call(tokens, attention_mask=self.masks(depth, end), position_ids=depth)

    def _call(self, ids, **options):
        if self.head is None:
            return self.model(input_ids=ids, use_cache=False, **options).logits
        return self.body(input_ids=ids, use_cache=False, **options).last_hidden_state

    def _states(self, paths):
        trie, nodes = tries.build(paths)
        outputs = self._forward(trie, [tries.Row(0, len(trie), 0)])[0]
        return [outputs[path] for path in nodes]

    def _plain_states(self, path):
        return self._call(torch.tensor([path], device=self.device))[0]


class TreeMasks:
    """Attention masks of prefix trees in the form that a model takes: bool for sdpa, additive for eager attention,
    one for each kind of layer where a model mixes full and sliding-window attention. `known` says whether its kinds
    are understood."""

    def __init__(self, model):
        causal = output_layer.causal_lm(model)
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


class _Wanted:
    """The (node, token) pairs to score, each once, sorted by node; and which of them make up each request."""

    def __init__(self, paths, continuations):
        lengths = [len(tokens) for tokens in continuations]
        node = numpy.concatenate([path[-n:] for path, n in zip(paths, lengths, strict=True)])
        token = numpy.concatenate([numpy.asarray(tokens, dtype=numpy.int64) for tokens in continuations])
        span = int(token.max()) + 1
        pairs, self.pair_of = numpy.unique(node * span + token, return_inverse=True)
        self.token = pairs % span
        self.nodes, self.state_of = numpy.unique(pairs // span, return_inverse=True)
        self.first = numpy.cumsum([0, *lengths[:-1]])
        self.found = numpy.full(len(pairs), numpy.nan)
        self.greedy = numpy.zeros(len(pairs), dtype=bool)

    def slice_of(self, row):
        """Which of `nodes` lie in `row` (its leading ancestors are another row's)."""
        return slice(*numpy.searchsorted(self.nodes, [row.start, row.stop]).tolist())

    def score(self, head, states, slices):
        """Fill in the pairs at `nodes[slice]` for each slice; `states` [N, width] are those nodes', one after another.

        Without a `head`, states are logits.
        """
        pairs = [numpy.arange(*numpy.searchsorted(self.state_of, [part.start, part.stop])) for part in slices]
        offset = numpy.cumsum([0, *(part.stop - part.start for part in slices)])
        rows = [self.state_of[p] - s.start + o for p, s, o in zip(pairs, slices, offset, strict=False)]
        pairs = numpy.concatenate(pairs)
        rows, targets = (torch.from_numpy(a).to(states.device) for a in (numpy.concatenate(rows), self.token[pairs]))
        if head is None:
            found, greedy = output_layer.score_logits(states, rows, targets)
        else:
            found, greedy = output_layer.score(head, states, rows, targets)
        self.found[pairs], self.greedy[pairs] = found.double().cpu().numpy(), greedy.cpu().numpy()

    def results(self):
        """(summed log-likelihood, all greedy) of each request."""
        sums = numpy.add.reduceat(self.found[self.pair_of], self.first)
        greedy = numpy.logical_and.reduceat(self.greedy[self.pair_of], self.first)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _crossover(model, config):
    """The row length at which attention takes as long as the linear layers: 2 P against 4 T width operations."""
    weights = sum(p.numel() for p in output_layer.causal_lm(model).base_model.parameters())
    weights -= model.get_input_embeddings().weight.numel()
    return max(1.0, ATTENTION_RATE * weights / (2 * config.num_hidden_layers * config.hidden_size))


def _distance(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())
