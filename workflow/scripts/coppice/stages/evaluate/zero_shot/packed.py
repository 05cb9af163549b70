"""Rows of a prefix tree through a model: masks, positions, batches by a token budget, and the scores that were asked.

A batch is rows of nearly equal length, with a 4D attention mask that lets a token see its ancestors alone, and with
depths for positions. The last hidden states are kept where a token is predicted and go through the output layer some
hundred at a time.
"""

import logging
from contextlib import contextmanager

import numpy
import torch

from coppice.core import logs
from coppice.core.errors import TransientError
from coppice.models import estimates, output_head
from coppice.models.prefix_tree import TreeForward, batches, build

logger = logging.getLogger("coppice.zero_shot")

HEAD_ROWS = 2048  # hidden states that go through the output layer together: its weights are read once for all of them
CPU_TOKENS = estimates.CPU_TOKENS  # tokens a batch and thread, up to GPU_TOKENS; measured: more gains nothing
GPU_TOKENS = estimates.EVALUATED_TOKENS
LOGITS_BYTES = 2**30  # of full logits, for models that change them after the head


class Packer:
    """Scores continuations under a causal LM, computing once what they have in common.

    `budget` is the number of tokens a batch.
    """

    def __init__(self, model, autocast_dtype=None):
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.device = model.get_input_embeddings().weight.device
        self.tree = TreeForward(model)
        self.head = self.tree.head
        self.budget = self._token_budget()

    def usable(self):
        """Whether the model takes a prefix tree."""
        with self._inference():
            return self.tree.usable()

    def score(self, requests, label="zero-shot scoring", quiet=False):
        """(log-likelihood, is the greedy continuation) of each request (input ids, continuation ids), in order.

        The input ids are the context and the continuation without its last token, already cut to the model's length;
        the last len(continuation) of them predict the continuation. None may be empty.
        """
        trie, paths = build([inputs for inputs, _ in requests])
        wanted = _Wanted(paths, [continuation for _, continuation in requests])
        rows = self.tree.rows(trie)
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
            config = self.tree.masks.config
            wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
            budget = min(GPU_TOKENS, free // 2 // (4 * estimates.kept_values(config.hidden_size, wide)))
        if self.head is None:
            budget = min(budget, LOGITS_BYTES // (4 * self.tree.masks.config.vocab_size))
        return max(1, int(budget))

    def _run(self, trie, rows, wanted):
        """Score everything that is `wanted` at the nodes of `rows`, and yield each row that is done."""
        pending = batches(rows, self.budget)[::-1]  # the longest last, and run first: memory runs out at once
        states, slices = [], []
        while pending:
            batch = pending.pop()
            hidden = self._wanted_states(trie, batch, wanted)
            if hidden is None:
                smaller = self._smaller(trie, batch)
                left = [row for other in pending for row in other]
                pending = batches(left + smaller, self.budget)[::-1]
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
        cut = [piece for row in rows for piece in self.tree.rows(trie, row.start, row.stop, limit=self.budget)]
        if len(rows) == 1 and len(cut) == 1:
            raise TransientError(f"a single request of {length} tokens does not fit in the device's memory")
        logger.warning("out of memory: going on with %d tokens a batch", self.budget)
        return cut

    def _wanted_states(self, trie, batch, wanted):
        """What the model gives at the wanted nodes of a batch [N, width], or None where memory does not suffice."""
        nodes = [wanted.nodes[wanted.slice_of(row)] for row in batch]
        line = numpy.repeat(numpy.arange(len(batch)), [len(found) for found in nodes])
        place = numpy.concatenate([found - row.start + row.lead for row, found in zip(batch, nodes, strict=True)])
        try:
            outputs = self.tree(trie, batch)
        except torch.OutOfMemoryError:
            return None
        return outputs[torch.from_numpy(line).to(outputs.device), torch.from_numpy(place).to(outputs.device)]


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
            found, greedy = output_head.score_logits(states, rows, targets)
        else:
            found, greedy = output_head.score(head, states, rows, targets)
        self.found[pairs], self.greedy[pairs] = found.double().cpu().numpy(), greedy.cpu().numpy()

    def results(self):
        """(summed log-likelihood, all greedy) of each request."""
        sums = numpy.add.reduceat(self.found[self.pair_of], self.first)
        greedy = numpy.logical_and.reduceat(self.greedy[self.pair_of], self.first)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))
