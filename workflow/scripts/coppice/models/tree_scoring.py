"""Score continuations under a causal LM, running what they have in common through the model only once.

All requests of a call form one prefix tree, which is cut into rows (see `prefix_tree`). A batch holds rows of
similar length. Its 4D attention mask lets a token attend only to its ancestors in the tree, and its positions are the
tokens' depths, so each branch is computed as if it were alone. The last hidden states are kept only where a token is
predicted, and are collected over several batches for the output layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy
import torch
from torch import nn

from coppice.core import logs
from coppice.core.errors import TransientError

from . import estimates, output_head
from .kinds import Fallback
from .prefix_tree import Row, TreeForward, Trie, batches, build

if TYPE_CHECKING:
    from .kinds import LoadedModel

logger = logging.getLogger("coppice.zero_shot")

# Hidden states to collect before the output layer runs. It reads its weights once per call, so calls should be large.
HEAD_ROWS = 2048
CPU_TOKENS = estimates.CPU_TOKENS  # tokens per batch and thread, up to GPU_TOKENS; measured: more is not faster
GPU_TOKENS = estimates.EVALUATED_TOKENS
LOGITS_BYTES = 2**30  # limit on a batch's full logits, for models that change their logits after the output layer


class Packer:
    """Scores continuations under a causal LM as one prefix tree.

    `token_limit` is the largest number of tokens per batch. It shrinks when memory runs out.

    Args:
        model: a loaded causal language model.
        autocast_dtype: dtype of lm-eval's mixed precision, or None.
    """

    def __init__(self, model: LoadedModel, autocast_dtype: torch.dtype | None = None) -> None:
        """Find out how many tokens fit into the memory that is free."""
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.tree = TreeForward(model)
        self.alone = self.tree.known.boundary is not None
        self.head = self.tree.head
        self.token_limit = self._fitting_tokens()

    def fallback(self) -> Fallback | None:
        """Return why the prefix tree would not be exact for the model, or None if it is; some passes find out."""
        return self.tree.fallback()

    def score(
        self, requests: Sequence[tuple[list[int], list[int]]], label: str = "zero-shot scoring", quiet: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, True if it is the greedy continuation) of each request, in order.

        Args:
            requests: (input ids, continuation ids), neither empty. The input ids are the context and the continuation
                without its last token, cut to the model's length; the last len(continuation) of them predict the
                continuation.
            label: label of the progress bar.
            quiet: show no progress.
        """
        # The last token of a continuation is predicted but predicts nothing, so it is not part of the tree.
        answers = [None] * len(requests)
        for members, reach in self.tree.groups([len(inputs) for inputs, _ in requests]):
            own = [requests[index] for index in members]
            for index, answer in zip(members, self._score_together(own, reach, label, quiet), strict=True):
                answers[index] = answer
        return answers

    def _score_together(
        self, requests: Sequence[tuple[list[int], list[int]]], reach: int, label: str, quiet: bool
    ) -> list[tuple[float, bool]]:
        """Score requests that may share passes, each of which must have `reach` positions."""
        trie, paths = build([inputs for inputs, _ in requests])
        wanted = _Wanted(paths, [continuation for _, continuation in requests])
        rows = self.tree.rows(trie)
        with self._inference():
            done = self._run(trie, rows, wanted, reach)
            # After an out-of-memory error rows are cut, and their number may then exceed the total of the progress bar.
            for _ in done if quiet else logs.progress(done, label, total=len(rows), unit="row"):
                pass
        return wanted.results()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        enabled = self.autocast_dtype is not None
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled):
            yield

    def _fitting_tokens(self) -> int:
        """Return the number of tokens per batch that should fit into memory."""
        if self.device.type != "cuda":
            limit = min(GPU_TOKENS, CPU_TOKENS * torch.get_num_threads())
        else:
            free, _ = torch.cuda.mem_get_info(self.device)
            hidden = self.model.get_input_embeddings().weight.shape[1]
            wide = getattr(self.tree.masks.config, "intermediate_size", None) or 4 * hidden
            # Use half of the free memory for one layer's activations, at 4 bytes per value. If that is too much after
            # all, `_smaller` halves the limit.
            limit = min(GPU_TOKENS, free // 2 // (4 * estimates.kept_values(hidden, wide)))
        if self.head is None:
            # The model returns logits for every token instead of hidden states, and they dominate the memory.
            limit = min(limit, LOGITS_BYTES // (4 * self.model.get_input_embeddings().weight.shape[0]))
        return max(1, int(limit))

    def _run(self, trie: Trie, rows: Sequence[Row], wanted: _Wanted, reach: int) -> Iterator[Row]:
        """Score all pairs in `wanted` that lie in `rows`, and yield each row when its forward pass is done."""
        # `pop` takes the last batch, so reverse the order: the longest rows run first, and a lack of memory shows at
        # the start instead of near the end.
        pending = batches(rows, self.token_limit)[::-1]
        states, slices = [], []
        while pending:
            batch = pending.pop()
            hidden = self._wanted_states(trie, batch, wanted, reach)
            if hidden is None:
                # Out of memory. Batch all that is left under the smaller limit: the next batches would fail as well.
                smaller = self._smaller(trie, batch)
                left = [row for other in pending for row in other]
                pending = batches(left + smaller, self.token_limit)[::-1]
                continue
            states.append(hidden)
            slices.extend(map(wanted.slice_of, batch))
            # Full logits are large, so without a head each batch is scored by itself.
            if not pending or sum(map(len, states)) >= HEAD_ROWS or self.head is None:
                wanted.score(self.head, torch.cat(states), slices)
                states, slices = [], []
            yield from batch

    def _smaller(self, trie: Trie, rows: Sequence[Row]) -> list[Row]:
        """Halve the token limit and return the rows of a batch that did not fit in memory, cut to the new limit."""
        torch.cuda.empty_cache()  # free the failed batch's cached blocks for allocations of other sizes
        length = sum(map(len, rows))
        # Halve what really ran if the batch was smaller than the limit, else the same batch would be tried again.
        self.token_limit = max(1, min(self.token_limit, length) // 2)
        cut = [piece for row in rows for piece in self.tree.rows(trie, row.start, row.stop, limit=self.token_limit)]
        if len(rows) == 1 and len(cut) == 1:  # a single path, which cannot be cut
            raise TransientError(
                f"a single request of {length} tokens does not fit into the device's memory. Use a device with more "
                "memory, or load the model with quantization."
            )
        logger.warning("out of memory: continuing with %d tokens per batch", self.token_limit)
        return cut

    def _wanted_states(self, trie: Trie, batch: Sequence[Row], wanted: _Wanted, reach: int) -> torch.Tensor | None:
        """Return the model's outputs at the wanted nodes of a batch [N, width], or None if it ran out of memory."""
        nodes = [wanted.nodes[wanted.slice_of(row)] for row in batch]
        line = numpy.repeat(numpy.arange(len(batch)), [len(found) for found in nodes])
        # A row begins with the `lead` ancestors of its first node, so node i is at position i - start + lead.
        place = numpy.concatenate([found - row.start + row.lead for row, found in zip(batch, nodes, strict=True)])
        try:
            outputs = self.tree(trie, batch, reach)
        except torch.OutOfMemoryError:
            # Retry outside this block: until it ends, the exception's traceback keeps the failed batch's tensors alive.
            return None
        return outputs[torch.from_numpy(line).to(outputs.device), torch.from_numpy(place).to(outputs.device)]


class _Wanted:
    """The (node, token) pairs to score, each once and sorted by node, and the pairs that make up each request.

    Requests share nodes and pairs: the last token of a context predicts the first token of each of its continuations,
    and continuations that begin alike share these predictions.

    nodes: nodes that predict something, ascending, int64 [N]; states are computed for these.
    token, state_of: the predicted token of each pair, and its index in `nodes`, int64 [P].
    pair_of: the pairs of all requests, one after another, int64 [tokens of all continuations].
    first: where each request begins in `pair_of`, int64 [requests].
    found, greedy: the log-likelihood of each pair, and whether it is the likeliest token, [P].
    """

    def __init__(self, paths: Sequence[numpy.ndarray], continuations: Sequence[Sequence[int]]) -> None:
        lengths = [len(tokens) for tokens in continuations]
        node = numpy.concatenate([path[-n:] for path, n in zip(paths, lengths, strict=True)])
        token = numpy.concatenate([numpy.asarray(tokens, dtype=numpy.int64) for tokens in continuations])
        # Pack each pair into one integer, so that one sort removes the duplicates and orders the pairs by node.
        span = int(token.max()) + 1
        pairs, self.pair_of = numpy.unique(node * span + token, return_inverse=True)
        self.token = pairs % span
        self.nodes, self.state_of = numpy.unique(pairs // span, return_inverse=True)
        self.first = numpy.cumsum([0, *lengths[:-1]])
        self.found = numpy.full(len(pairs), numpy.nan)  # a pair that was forgotten would show as NaN, not as a number
        self.greedy = numpy.zeros(len(pairs), dtype=bool)

    def slice_of(self, row: Row) -> slice:
        """Return the slice of `nodes` that lie in `row`, without its leading ancestors, which belong to another row."""
        return slice(*numpy.searchsorted(self.nodes, [row.start, row.stop]).tolist())

    def score(self, head: nn.Linear | None, states: torch.Tensor, slices: Sequence[slice]) -> None:
        """Score the pairs at `nodes[part]` for each slice `part`.

        Args:
            head: the output layer, or None if `states` are logits.
            states: outputs of the model at these nodes, one slice after another [N, width].
            slices: slices of `nodes`.
        """
        pairs = [numpy.arange(*numpy.searchsorted(self.state_of, [part.start, part.stop])) for part in slices]
        offset = numpy.cumsum([0, *(part.stop - part.start for part in slices)])
        # `offset` has one more entry than there are slices: the total.
        rows = [self.state_of[p] - s.start + o for p, s, o in zip(pairs, slices, offset, strict=False)]
        pairs = numpy.concatenate(pairs)
        rows, targets = (torch.from_numpy(a).to(states.device) for a in (numpy.concatenate(rows), self.token[pairs]))
        if head is None:
            found, greedy = output_head.score_logits(states, rows, targets)
        else:
            found, greedy = output_head.score(head, states, rows, targets)
        # Sum up in float64 later, so that long continuations lose no precision.
        self.found[pairs], self.greedy[pairs] = found.double().cpu().numpy(), greedy.cpu().numpy()

    def results(self) -> list[tuple[float, bool]]:
        """Return (summed log-likelihood, True if every token is the likeliest) of each request."""
        sums = numpy.add.reduceat(self.found[self.pair_of], self.first)
        greedy = numpy.logical_and.reduceat(self.greedy[self.pair_of], self.first)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))
