"""Requests as a prefix tree, and the tree cut into rows that a model runs in one forward pass.

Requests that begin with the same tokens share those tokens' computation. Sorted, each request adds to the tree only
what lies beyond the prefix that it shares with the one before, so that the nodes come out in depth-first order: a
node's descendants are the ones right after it, up to `end`, and "j is i or above it" is `j <= i < end[j]`.

A row is a run of consecutive nodes, led by the ancestors of its first one. Cutting inside a tree repeats those
ancestors in the next row; not cutting makes attention quadratic in the row's length: `rows` finds the cheapest cuts.
"""

from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Trie:
    """Nodes in depth-first order; node i holds one token.

    token, depth, end: int64 [nodes], `depth` counting from 0 and `end` the first node that is no descendant.
    cuts: int64 [pieces], the nodes at which a request left the path of the one before it, ascending; between two cuts
    each node is the parent of the next. parents: int64 [pieces], the parent of each such node, -1 for a root.
    """

    token: numpy.ndarray
    depth: numpy.ndarray
    end: numpy.ndarray
    cuts: numpy.ndarray
    parents: numpy.ndarray

    def __len__(self):
        return len(self.token)

    def ancestors(self, node):
        """The nodes above `node`, from its root down: int64 [depth of node]."""
        runs = []
        piece = int(numpy.searchsorted(self.cuts, node, side="right")) - 1
        while True:
            runs.append(numpy.arange(self.cuts[piece], node))
            node = int(self.parents[piece])
            if node < 0:
                return numpy.concatenate(runs[::-1])
            runs.append(numpy.array([node]))
            piece = int(numpy.searchsorted(self.cuts, node, side="right")) - 1


@dataclass(frozen=True)
class Row:
    """Nodes `start` to `stop` of a trie, after the `lead` ancestors of the first; `len` counts both."""

    start: int
    stop: int
    lead: int

    def __len__(self):
        return self.lead + self.stop - self.start


def build(sequences):
    """The trie of token sequences (lists of ints, none empty), and the path of each: int64 [its length], of nodes."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    size = sum(map(len, sequences))
    token, depth, end = (numpy.zeros(size, dtype=numpy.int64) for _ in range(3))
    path = numpy.zeros(max(map(len, sequences), default=0), dtype=numpy.int64)
    before = numpy.zeros(0, dtype=numpy.int64)
    cuts, parents, paths = [], [], [None] * len(sequences)
    count = 0
    for index in order:
        tokens = numpy.asarray(sequences[index], dtype=numpy.int64)
        shared = _common_prefix(before, tokens)
        end[path[shared : len(before)]] = count
        added = len(tokens) - shared
        if added:
            cuts.append(count)
            parents.append(path[shared - 1] if shared else -1)
            token[count : count + added] = tokens[shared:]
            depth[count : count + added] = numpy.arange(shared, len(tokens))
            path[shared : len(tokens)] = numpy.arange(count, count + added)
            count += added
        paths[index] = path[: len(tokens)].copy()
        before = tokens
    end[path[: len(before)]] = count
    pieces = (numpy.array(cuts, dtype=numpy.int64), numpy.array(parents, dtype=numpy.int64))
    return Trie(token[:count].copy(), depth[:count].copy(), end[:count].copy(), *pieces), paths


def _common_prefix(a, b):
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def rows(trie, limit, crossover, first=0, last=None):
    """Cut nodes `first` to `last` of `trie` into rows of least cost, none above `limit` nodes where a cut can help.

    A row of n nodes costs n + n^2 / crossover: `crossover` is the length at which attention costs as much as all the
    rest.
    """
    last = len(trie) if last is None else last
    inner = trie.cuts[(trie.cuts > first) & (trie.cuts < last)]
    places = numpy.concatenate([[first], inner, [last]])
    lead = trie.depth[places[:-1]]
    origin = places[:-1] - lead  # a row from place i to place j has places[j] - origin[i] nodes; ascending in i

    def lowest(stop):
        return numpy.searchsorted(origin[:stop], places[stop] - limit)

    def cost(low, stop):
        length = (places[stop] - origin[low:stop]).astype(float)
        return length + length * length / crossover

    runs = _cheapest_runs(len(places) - 1, lowest, cost)
    return [Row(int(places[start]), int(places[stop]), int(lead[start])) for start, stop in runs]


def batches(rows, budget):
    """Group rows into batches of at most `budget` tokens, padding included, the longest first: lists of Row.

    Each row is padded to the longest of its batch; a batch costs its tokens and 1/32 of the budget.
    """
    rows = sorted(rows, key=len)
    lengths = numpy.array([len(row) for row in rows])

    def lowest(stop):
        return stop - budget // lengths[stop - 1]

    def cost(low, stop):
        return (stop - numpy.arange(low, stop)) * lengths[stop - 1] + budget / 32

    return [rows[start:stop] for start, stop in _cheapest_runs(len(rows), lowest, cost)][::-1]


def _cheapest_runs(count, lowest, cost):
    """Divide 0 ... count into runs (start, stop) of least total cost, by dynamic programming.

    A run that ends at `stop` begins at `lowest(stop)` or later, if only at stop - 1; `cost(low, stop)` gives the costs
    of the runs from low, low + 1, ... stop - 1 to stop.
    """
    best = numpy.zeros(count + 1)
    back = numpy.zeros(count + 1, dtype=numpy.int64)
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
