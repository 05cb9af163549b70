"""Build a prefix tree of token sequences, and cut it into rows that a model runs in one forward pass.

Sequences that begin with the same tokens share the computation of those tokens. Sorted, each sequence adds to the tree
only what lies beyond the prefix that it shares with the one before it. So the nodes come in depth-first order: a node's
descendants are the nodes right after it, up to `end`, and "j is i or an ancestor of i" is `j <= i < end[j]`.

A row is a run of consecutive nodes, led by the ancestors of its first one. A cut inside the tree repeats those
ancestors in the next row, and without a cut the cost of attention grows with the square of the row's length. `rows`
finds the cheapest cuts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Trie:
    """Nodes in depth-first order; each node holds one token.

    Attributes:
        token, depth, end: int64 [nodes]; `depth` counts from 0, `end` is the first node that is not a descendant.
        cuts: int64 [pieces], ascending; the nodes at which a sequence left the path of the one before it. Between two
            cuts each node is the parent of the next one.
        parents: int64 [pieces]; the parent of the node at each cut, -1 for a root.
    """

    token: numpy.ndarray
    depth: numpy.ndarray
    end: numpy.ndarray
    cuts: numpy.ndarray
    parents: numpy.ndarray

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.token)

    def ancestors(self, node: int) -> numpy.ndarray:
        """Return the ancestors of `node` from its root down: int64 [depth of node]."""
        runs = []
        piece = int(numpy.searchsorted(self.cuts, node, side="right")) - 1
        while True:  # piece by piece: inside a piece, the ancestors are the nodes since its cut
            runs.append(numpy.arange(self.cuts[piece], node))
            node = int(self.parents[piece])
            if node < 0:
                return numpy.concatenate(runs[::-1])
            runs.append(numpy.array([node]))
            piece = int(numpy.searchsorted(self.cuts, node, side="right")) - 1


@dataclass(frozen=True)
class Row:
    """Nodes `start` to `stop` of a trie behind the `lead` ancestors of the first one; `len` counts both."""

    start: int
    stop: int
    lead: int

    def __len__(self) -> int:
        """Return the number of nodes, ancestors included."""
        return self.lead + self.stop - self.start


def build(sequences: Sequence[list[int]]) -> tuple[Trie, list[numpy.ndarray]]:
    """Return the trie of token sequences, and the path of each sequence through it: int64 [its length], of nodes.

    sequences: lists of ints, none of them empty.
    """
    # sorted: of all sequences before it, the last one shares the longest prefix with a sequence
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    size = sum(map(len, sequences))  # the most nodes there can be; cut to the real number at the end
    token, depth, end = (numpy.zeros(size, dtype=numpy.int64) for _ in range(3))
    # the nodes of the current sequence by depth, overwritten from the depth at which the next one branches off
    path = numpy.zeros(max(map(len, sequences), default=0), dtype=numpy.int64)
    before = numpy.zeros(0, dtype=numpy.int64)
    cuts, parents, paths = [], [], [None] * len(sequences)
    count = 0
    for index in order:
        tokens = numpy.asarray(sequences[index], dtype=numpy.int64)
        shared = _common_prefix(before, tokens)
        end[path[shared : len(before)]] = count  # these nodes get no more descendants
        added = len(tokens) - shared  # 0 for a repeated sequence
        if added:
            cuts.append(count)
            parents.append(path[shared - 1] if shared else -1)
            token[count : count + added] = tokens[shared:]
            depth[count : count + added] = numpy.arange(shared, len(tokens))
            path[shared : len(tokens)] = numpy.arange(count, count + added)
            count += added
        paths[index] = path[: len(tokens)].copy()  # `path` is overwritten
        before = tokens
    end[path[: len(before)]] = count  # closes the path of the last sequence
    pieces = (numpy.array(cuts, dtype=numpy.int64), numpy.array(parents, dtype=numpy.int64))
    return Trie(token[:count].copy(), depth[:count].copy(), end[:count].copy(), *pieces), paths


def _common_prefix(a: numpy.ndarray, b: numpy.ndarray) -> int:
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length  # without a True, argmax is 0


def rows(trie: Trie, limit: int, crossover: float, first: int = 0, last: int | None = None) -> list[Row]:
    """Cut nodes `first` to `last` of `trie` into the rows of lowest cost, with at most `limit` nodes if possible.

    A row of n nodes costs n + n^2 / crossover: at length `crossover`, attention costs as much as everything else.
    """
    last = len(trie) if last is None else last
    # only where a branch begins: a row that begins inside a piece would also repeat the beginning of that piece
    inner = trie.cuts[(trie.cuts > first) & (trie.cuts < last)]
    places = numpy.concatenate([[first], inner, [last]])
    lead = trie.depth[places[:-1]]
    # A row from place i to place j has places[j] - origin[i] nodes. `origin` ascends, so a binary search finds the
    # first place from which a row is short enough.
    origin = places[:-1] - lead

    def lowest(stop: int) -> int:
        return numpy.searchsorted(origin[:stop], places[stop] - limit)

    def cost(low: int, stop: int) -> numpy.ndarray:
        length = (places[stop] - origin[low:stop]).astype(float)
        return length + length * length / crossover

    runs = _cheapest_runs(len(places) - 1, lowest, cost)
    return [Row(int(places[start]), int(places[stop]), int(lead[start])) for start, stop in runs]


def batches(rows: Sequence[Row], token_limit: int) -> list[list[Row]]:
    """Group rows into batches of at most `token_limit` tokens, padding included: lists of Row, the longest rows first.

    Each row is padded to the longest of its batch. A batch costs its tokens and 1/32 of the limit, for its overhead.
    """
    # among sorted rows, the cheapest batches are runs of neighbors: they need the least padding
    rows = sorted(rows, key=len)
    lengths = numpy.array([len(row) for row in rows])

    def lowest(stop: int) -> int:  # the longest row of a batch is its last, lengths[stop - 1]
        return stop - token_limit // lengths[stop - 1]

    def cost(low: int, stop: int) -> numpy.ndarray:
        return (stop - numpy.arange(low, stop)) * lengths[stop - 1] + token_limit / 32

    return [rows[start:stop] for start, stop in _cheapest_runs(len(rows), lowest, cost)][::-1]


def _cheapest_runs(
    count: int, lowest: Callable[[int], int], cost: Callable[[int, int], numpy.ndarray]
) -> list[tuple[int, int]]:
    """Divide 0 ... count into runs (start, stop) of the lowest total cost, by dynamic programming.

    A run that ends at `stop` begins at `lowest(stop)` or later, but may always begin at stop - 1. `cost(low, stop)`
    returns the costs of the runs to `stop` from low, low + 1, ..., stop - 1.
    """
    best = numpy.zeros(count + 1)  # the least cost of dividing 0 ... stop
    back = numpy.zeros(count + 1, dtype=numpy.int64)  # where the last of those runs begins
    for stop in range(1, count + 1):
        low = max(0, min(int(lowest(stop)), stop - 1))
        total = best[low:stop] + cost(low, stop)
        pick = int(total.argmin())
        best[stop], back[stop] = total[pick], low + pick
    runs = []
    while count > 0:
        runs.append((int(back[count]), count))
        count = int(back[count])
    return runs[::-1]
