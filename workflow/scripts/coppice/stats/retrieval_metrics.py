"""Rank the right items of a retrieval, or of a classification, and count how often one is among the first few."""

from collections.abc import Sequence

import numpy

DEPTHS = (1, 5, 10)  # recall is reported among this many items
TO_TEXT, TO_IMAGE = "image_to_text", "text_to_image"
QUERIES = 512  # that are ranked together


def ranks(similarity: numpy.ndarray, right: numpy.ndarray) -> numpy.ndarray:
    """Return the rank [queries] of each query's best right item, 1 for the first.

    A query with several right items has the rank of the best of them, and the other right ones do not count as ahead of
    it. A wrong item with the same similarity counts as ahead, so a model that gives all items one similarity finds
    nothing.

    Args:
        similarity: [queries, items], higher is more similar. Large galleries may be ranked some queries at a time.
        right: [queries, items], True for the items that are right for a query; each query has at least one.

    Raises:
        ValueError: A similarity is not finite, or a query has no right item.
    """
    similarity, right = numpy.asarray(similarity), numpy.asarray(right, dtype=bool)
    if not numpy.isfinite(similarity).all():
        raise ValueError("a similarity is not finite")
    if not right.any(axis=1).all():
        raise ValueError("a query has no right item")
    best = numpy.where(right, similarity, -numpy.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best) & ~right).sum(axis=1)


def both_ways(
    pictures: numpy.ndarray, texts: numpy.ndarray, owners: Sequence[int], copies: Sequence[int]
) -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
    """Return, for each direction, the rank of each query and how many items are right for it.

    A picture has found one of its captions if any of them is among the first, and each caption is a query of its own. A
    caption that several pictures have is right for all of them.

    Args:
        pictures: their embeddings [pictures, width], of length 1.
        texts: those of distinct texts [texts, width], so that copies of a text have exactly one similarity.
        owners: the picture of each caption, [captions].
        copies: the distinct text of each caption, [captions].
    """
    owners, copies = numpy.asarray(owners), numpy.asarray(copies)
    described = numpy.zeros((len(pictures), len(texts)), dtype=bool)
    described[owners, copies] = True
    found = {}
    for direction, queries in ((TO_TEXT, pictures), (TO_IMAGE, texts[copies])):
        parts = []
        for start in range(0, len(queries), QUERIES):
            part = slice(start, start + QUERIES)
            if direction == TO_TEXT:
                # one similarity for each distinct text: a product may round the columns of its copies differently
                similar, right = (pictures[part] @ texts.T)[:, copies], described[part][:, copies]
            else:
                similar, right = queries[part] @ pictures.T, described[:, copies[part]].T
            parts.append((ranks(similar, right), right.sum(axis=1)))
        found[direction] = tuple(numpy.concatenate(each) for each in zip(*parts, strict=True))
    return found


def recall(ranks: numpy.ndarray, depth: int) -> float:
    """Return the share of queries with a right item among the first `depth`."""
    return float((numpy.asarray(ranks) <= depth).mean())


def chance(right_items: numpy.ndarray, items: int, depth: int) -> float:
    """Return the recall that random order is expected to give.

    right_items: [queries], how many of all `items` are right for each query.
    """
    from scipy.stats import hypergeom

    return float(1 - hypergeom.pmf(0, items, numpy.asarray(right_items), min(depth, items)).mean())
