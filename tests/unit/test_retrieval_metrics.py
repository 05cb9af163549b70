"""Ranks and recall of retrieval, against plain loops over sorted lists."""

import numpy
import pytest

from coppice.stats import retrieval_metrics


def worst_rank(similarity, right):
    """Return the rank of the best right item if wrong items come first among equals, by sorting."""
    order = sorted(range(len(similarity)), key=lambda item: (-similarity[item], right[item]))
    return next(place for place, item in enumerate(order, 1) if right[item])


def test_ranks_equal_those_of_sorted_lists_with_ties_and_several_right_items():
    random = numpy.random.default_rng(0)
    similarity = random.integers(0, 6, size=(50, 20)) / 5  # many ties
    right = random.uniform(size=(50, 20)) < 0.2
    right[:, 3] = True
    found = retrieval_metrics.ranks(similarity, right)
    assert found.tolist() == [worst_rank(*row) for row in zip(similarity, right, strict=True)]
    for depth in retrieval_metrics.DEPTHS:
        among = [worst_rank(*row) <= depth for row in zip(similarity, right, strict=True)]
        assert retrieval_metrics.recall(found, depth) == pytest.approx(sum(among) / 50)


def test_recall_without_ties_is_that_of_the_largest_similarities():
    random = numpy.random.default_rng(1)
    similarity, owner = random.normal(size=(30, 150)), numpy.repeat(range(30), 5)  # five captions a picture
    right = owner[None] == numpy.arange(30)[:, None]
    found = retrieval_metrics.ranks(similarity, right)
    for depth in retrieval_metrics.DEPTHS:
        first = numpy.argsort(-similarity, axis=1)[:, :depth]
        expected = numpy.mean([(owner[row] == query).any() for query, row in enumerate(first)])
        assert retrieval_metrics.recall(found, depth) == pytest.approx(expected)


def test_a_model_that_finds_everything_equally_similar_finds_nothing():
    right = numpy.eye(20, dtype=bool)
    assert retrieval_metrics.recall(retrieval_metrics.ranks(numpy.ones((20, 20)), right), 10) == 0


@pytest.mark.parametrize("depth", [1, 5, 10])
def test_chance_is_the_mean_recall_of_random_order(depth):
    random = numpy.random.default_rng(2)
    counts = numpy.array([1, 2, 5])
    right = numpy.arange(12) < counts[:, None]
    draws = [retrieval_metrics.ranks(random.normal(size=(3, 12)), right) for _ in range(4000)]
    expected = numpy.mean([retrieval_metrics.recall(one, depth) for one in draws])
    assert retrieval_metrics.chance(counts, 12, depth) == pytest.approx(expected, abs=0.015)


def test_refuses_similarities_that_are_not_finite_and_queries_without_a_right_item():
    with pytest.raises(ValueError, match="not finite"):
        retrieval_metrics.ranks(numpy.array([[numpy.nan, 1.0]]), numpy.array([[True, False]]))
    with pytest.raises(ValueError, match="no right item"):
        retrieval_metrics.ranks(numpy.zeros((1, 2)), numpy.zeros((1, 2), dtype=bool))
