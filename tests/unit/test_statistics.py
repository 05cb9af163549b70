"""Statistics of paired comparisons, checked against worked examples and scipy."""

import math

import numpy
import pytest
from scipy import stats
from scipy.fft import dct

from coppice.stats import across_models, blocks, paired_stats, stored_samples


def test_mcnemar_of_a_worked_example():
    before = [True] * 1 + [False] * 7 + [True] * 12
    after = [False] * 1 + [True] * 7 + [True] * 12
    # 8 discordant pairs, 1 of them against: 2 * (C(8,0) + C(8,1)) / 2^8 = 18 / 256
    assert paired_stats.mcnemar(before, after) == {"p": pytest.approx(18 / 256), "gained_items": 7, "lost_items": 1}


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    random = numpy.random.default_rng(3)
    before, after = random.random(200) < 0.6, random.random(200) < 0.7
    found = paired_stats.mcnemar(before, after)
    discordant = found["gained_items"] + found["lost_items"]
    assert found["p"] == pytest.approx(stats.binomtest(found["gained_items"], discordant, 0.5).pvalue)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 3)])
def test_mcnemar_without_a_difference_gives_a_p_value_of_one(gained, lost):
    before = [False] * gained + [True] * lost + [True] * 5
    after = [True] * gained + [False] * lost + [True] * 5
    assert paired_stats.mcnemar(before, after)["p"] == 1.0


def test_the_paired_test_finds_a_change_that_the_unpaired_one_misses():
    before = numpy.arange(1000) < 600
    after = before.copy()
    after[600:615] = True  # 15 items gained, none lost
    naive = stats.chi2_contingency([[600, 400], [615, 385]]).pvalue
    assert naive > 0.4
    assert paired_stats.mcnemar(before, after)["p"] < 0.001


def test_the_paired_test_is_not_misled_by_items_that_swap():
    before = numpy.arange(100) < 50
    after = ~before
    after[:6] = True  # 50 gained, 44 lost: nearly every item changes
    assert paired_stats.mcnemar(before, after)["p"] == pytest.approx(stats.binomtest(50, 94).pvalue)
    assert paired_stats.mcnemar(before, after)["p"] > 0.5


def test_holm_of_a_worked_example():
    # sorted: .01*4, max(.04, .02*3), max(.06, .03*2), max(.06, .5*1)
    assert paired_stats.holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert paired_stats.holm([]) == []


def _means(*rows, **options):
    return across_models.means(range(len(rows)), rows, **options)


def test_resamples_all_columns_together():
    before = numpy.random.default_rng(0).normal(size=500)
    assert _means(before, before + 1.0).contrast({1: 1, 0: -1})["interval"] == pytest.approx([1.0, 1.0])


def test_weighted_means_weigh_windows_by_their_tokens():
    assert list(_means([1.0, 4.0], [2.0, 2.0], weights=[3, 1]).values) == [1.75, 2.0]


def test_the_mean_over_tasks_weighs_small_and_large_tasks_equally():
    large, small = _means([1.0] * 90 + [0.0] * 10), _means([1.0] * 5 + [0.0] * 5)
    assert across_models.mean_of([large, small]).values[0] == pytest.approx(0.7)


def test_the_interval_of_documents_is_that_of_the_jackknife():
    """Leave one document after another out and take all means again, with the tokens of each model's own tokenizer."""
    random = numpy.random.default_rng(8)
    sizes = random.lognormal(6, 0.7, 40)
    tokens = numpy.stack([sizes, 1.2 * sizes + random.normal(0, 20, 40)])
    losses = 3 + random.normal(size=(2, 40))
    means = _means(*losses, weights=tokens, unit=stored_samples.DOCUMENTS)

    def difference(kept):
        first, second = (losses[:, kept] * tokens[:, kept]).sum(1) / tokens[:, kept].sum(1)
        return first - second

    without = numpy.array([difference(numpy.arange(40) != out) for out in range(40)])
    shares = (tokens / tokens.sum(1, keepdims=True)).mean(0)
    effective = 1 / (shares**2).sum()
    error = (((without - difference(slice(None))) ** 2).sum() * (1 - 1 / effective)) ** 0.5
    found, freedom = means.error({0: 1, 1: -1})
    assert found == pytest.approx(error, rel=0.01)  # the two models' shares of a document differ a little
    half = stats.t.ppf(0.975, effective - 1) * found
    low, high = means.contrast({0: 1, 1: -1})["interval"]
    assert freedom == pytest.approx(effective - 1) and (high - low) / 2 == pytest.approx(half)


def _autoregressive(count, rho, seed):
    random = numpy.random.default_rng(seed)
    noise, series = random.normal(size=count), numpy.empty(count)
    series[0] = noise[0]
    for place in range(1, count):
        series[place] = rho * series[place - 1] + noise[place]
    return series


@pytest.mark.parametrize(
    ("count", "rho", "length"),
    [
        # the circular bootstrap's length by `optimal_block_length` of the package arch 8.0.0
        (379, 0.0, 0.7167136785033916),
        (379, 0.3, 4.796567297489125),
        (379, 0.5, 7.99106353442424),
        (100, 0.5, 5.050728908189503),
        (60, 0.8, 6.837821503110832),
    ],
)
def test_the_block_length_is_that_of_politis_and_white(count, rho, length):
    found, _ = blocks.optimal_length(_autoregressive(count, rho, 11))
    assert found == pytest.approx(length)


def test_the_variance_of_blocks_is_that_of_drawing_them():
    """Draw blocks of neighbors from a circle, 20,000 times, and take the variance of the difference of two means."""
    count, length, random = 120, 8, numpy.random.default_rng(0)
    series = numpy.stack([_autoregressive(count, 0.5, 1), _autoregressive(count, 0.3, 2)])
    series -= series.mean(axis=1, keepdims=True)
    starts = random.integers(count, size=(20_000, count // length))
    places = (starts[..., None] + numpy.arange(length)).reshape(len(starts), -1) % count
    drawn = numpy.cov(series[:, places].sum(axis=2))
    found = blocks.of_blocks(series, blocks.Blocks(length, bias=0.0))
    assert found * (1 - length / count) == pytest.approx(drawn, rel=0.05)


def test_a_short_series_takes_the_mean_square_of_its_slowest_cosine_waves():
    """Compared with scipy's orthonormal cosine transform; 0.4 n^(2/3) waves (Lazarus et al. 2018) are 3 for 24."""
    series = numpy.stack([_autoregressive(24, 0.5, 1), _autoregressive(24, 0.3, 2)])
    series -= series.mean(axis=1, keepdims=True)
    waves = dct(series, norm="ortho")[:, 1:4]
    found, freedom = blocks.covariance(series)
    assert freedom == 3 and found == pytest.approx(24 * waves @ waves.T / 3)


@pytest.mark.parametrize(("count", "waves"), [(2, 1), (5, 2), (21, 3), (59, 6)])
def test_even_two_windows_have_an_interval(count, waves):
    found = _means(_autoregressive(count, 0.5, 3), unit=stored_samples.WINDOWS)
    error, freedom = found.error({0: 1})
    assert error > 0 and freedom == pytest.approx(waves)


def test_windows_that_are_alike_give_a_wider_interval_than_windows_that_are_not():
    series = _autoregressive(379, 0.5, 4)
    apart = _means(series, numpy.zeros(379)).error({0: 1, 1: -1})[0]
    together = _means(series, numpy.zeros(379), unit=stored_samples.WINDOWS)
    assert together.error({0: 1, 1: -1})[0] > 1.4 * apart  # sqrt(3) in theory
    assert together.resampled({0: 1, 1: -1})["block"] > 5


def test_equal_windows_have_an_interval_of_no_width():
    series = _autoregressive(60, 0.5, 4)
    found = _means(series, series + 1, unit=stored_samples.WINDOWS).contrast({1: 1, 0: -1})
    assert found["interval"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("count", "unit"), [(379, "windows"), (60, "windows"), (24, "windows"), (12, "documents")])
def test_intervals_cover_the_truth_as_often_as_they_say(count, unit):
    """A small share of what `benchmarks/coverage.py` measures; 300 intervals of 95 % cover 93 to 97 %, +- 2.5 %."""
    covered = 0
    for seed in range(300):
        if unit == "windows":
            rows, sizes = [_autoregressive(count, 0.5, 2 * seed), _autoregressive(count, 0.3, 2 * seed + 1)], None
        else:
            random = numpy.random.default_rng(seed)
            sizes, rows = random.lognormal(8, 0.7, count), random.normal(size=(2, count))
        low, high = _means(*rows, weights=sizes, unit=unit).contrast({0: 1, 1: -1})["interval"]
        covered += low <= 0 <= high
    assert 0.91 < covered / 300 < 0.99


def test_says_what_was_resampled_and_that_few_units_are_not_reliable():
    few = _means(range(7), unit=stored_samples.DOCUMENTS, note="old")
    assert few.resampled({0: 1}) == {
        "unit": "documents",
        "count": 7,
        "block": None,
        "note": "old; fewer than 20 documents (7) give no reliable interval",
    }
    assert _means(range(20)).resampled({0: 1})["note"] is None


def test_one_item_has_no_interval_and_no_verdict():
    means = _means([1.0], [0.0], [1.0])
    found = means.contrast({2: 1, 1: -1})
    assert (found["value"], found["interval"]) == (1.0, None)
    assert paired_stats.verdict_of_interval(found["interval"]) == "no clear change"
    recovered = means.recovered(0, 1, 2, higher_is_better=True)
    assert recovered["interval"] is None and "single" in recovered["note"]


def test_rejects_a_comparison_without_items():
    with pytest.raises(ValueError, match="no item"):
        _means([], [])


def _levels(*means, noise=0.0, count=400):
    random = numpy.random.default_rng(2)
    shared = random.normal(size=count)
    rows = [mean + shared + noise * random.normal(size=count) for mean in means]
    return _means(*(row - row.mean() + mean for row, mean in zip(rows, means, strict=True)))


def test_recovered_fraction_of_a_worked_example():
    # lost 0.20, regained 0.15
    found = _levels(0.70, 0.50, 0.65, noise=0.05).recovered(0, 1, 2, higher_is_better=True)
    assert found["value"] == pytest.approx(0.75)
    assert found["interval"][0] < 0.75 < found["interval"][1]


def test_recovered_fraction_of_perplexity_counts_a_fall_as_a_recovery():
    means = _levels(10.0, 30.0, 15.0, noise=0.05)
    assert means.recovered(0, 1, 2, higher_is_better=False)["value"] == pytest.approx(0.75)
    assert means.recovered(0, 1, 2, higher_is_better=True)["value"] is None


@pytest.mark.parametrize("pruned", [0.7, 0.8])
def test_recovered_fraction_is_undefined_if_pruning_lost_nothing(pruned):
    found = _levels(0.7, pruned, 0.9).recovered(0, 1, 2, higher_is_better=True)
    assert found == {"value": None, "interval": None, "note": "pruning lost nothing"}


def test_recovered_fraction_has_no_interval_if_the_loss_is_within_noise():
    found = _levels(0.70, 0.69, 0.75, noise=1.0).recovered(0, 1, 2, higher_is_better=True)
    assert found["interval"] is None and "within noise" in found["note"]
    assert math.isfinite(found["value"])


def test_perplexity_has_the_interval_of_the_bootstrap():
    random = numpy.random.default_rng(3)
    losses = 2.5 + 0.3 * random.normal(size=300) + numpy.array([[0.0], [0.4]]) + 0.1 * random.normal(size=(2, 300))
    found = _means(*losses).exp().contrast({1: 1, 0: -1})
    drawn = losses[:, random.integers(300, size=(20_000, 300))].mean(axis=2)
    bounds = numpy.quantile(numpy.exp(drawn[1]) - numpy.exp(drawn[0]), [0.025, 0.975])
    assert found["value"] == pytest.approx(numpy.diff(numpy.exp(losses.mean(axis=1))).item())
    assert found["interval"] == pytest.approx(list(bounds), rel=0.03)


def test_verdicts_of_p_values_and_intervals():
    assert paired_stats.verdict(0.1, 0.01) == "better"
    assert paired_stats.verdict(-0.1, 0.01) == "worse"
    assert paired_stats.verdict(0.1, 0.06) == "no clear change"
    assert paired_stats.verdict_of_interval([0.1, 0.2], higher_is_better=False) == "worse"
    assert paired_stats.verdict_of_interval([-0.2, -0.1], higher_is_better=False) == "better"
    assert paired_stats.verdict_of_interval([-0.1, 0.1]) == "no clear change"


def test_spread_over_seeds_of_a_worked_example():
    # mean 2, sd 1, t(2) at 97.5 % is 4.303: 2 +- 4.303 / sqrt(3)
    found = paired_stats.over_seeds([1, 2, 3])
    assert (found["n"], found["mean"], found["sd"]) == (3, 2.0, 1.0)
    assert found["interval"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-3)


def test_one_seed_has_no_spread_and_equal_seeds_have_a_spread_of_zero():
    assert paired_stats.over_seeds([0.5])["sd"] is None
    assert paired_stats.over_seeds([0.5, 0.5])["interval"] == [0.5, 0.5]


def test_sign_flip_is_exact():
    # only all-plus and all-minus are as far from zero: 2 of 2^6
    assert paired_stats.sign_flip([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)
    assert paired_stats.sign_flip([1]) is None


def test_the_test_of_groups_is_exact():
    # of the 15 ways to split six models into three pairs, one is as far apart
    assert paired_stats.groups_differ([[1, 1.1], [2, 2.1], [3, 3.1]]) == pytest.approx(1 / 15)
    assert paired_stats.groups_differ([[1, 2], [3]]) is None


def test_a_contrast_of_means_agrees_with_the_paired_t_test():
    random = numpy.random.default_rng(4)
    first = random.random(2000)
    second = first + random.normal(0.01, 0.1, 2000)
    means = across_models.means(["a", "b"], [first, second])
    found, expected = means.contrast({"b": 1, "a": -1}), stats.ttest_rel(second, first)
    assert found["value"] == pytest.approx((second - first).mean())
    assert found["interval"] == pytest.approx(list(expected.confidence_interval()), rel=0.01)
    assert found["p"] == pytest.approx(expected.pvalue, rel=0.1)


def test_a_contrast_over_tasks_adds_the_variances_of_the_tasks():
    random = numpy.random.default_rng(5)
    tasks = [random.random((2, 300)), random.random((2, 900))]
    means = across_models.mean_of([across_models.means(["a", "b"], task) for task in tasks])
    expected = sum(numpy.var(task[0] - task[1], ddof=1) / task.shape[1] for task in tasks) / 4
    error, freedom = means.error({"a": 1, "b": -1})
    assert error**2 == pytest.approx(expected)
    parts = [numpy.var(task[0] - task[1], ddof=1) / task.shape[1] for task in tasks]
    satterthwaite = sum(parts) ** 2 / sum(
        part**2 / (task.shape[1] - 1) for part, task in zip(parts, tasks, strict=True)
    )
    assert freedom == pytest.approx(satterthwaite)


def test_fieller_agrees_with_the_bootstrap():
    random = numpy.random.default_rng(6)
    shared = random.random(5000)
    rows = [(shared < edge).astype(float) for edge in (0.8, 0.5, 0.7)]
    means = across_models.means(["dense", "pruned", "tuned"], rows)
    fieller = means.ratio({"tuned": 1, "pruned": -1}, {"dense": 1, "pruned": -1})
    dense, pruned, tuned = numpy.array(rows)[:, random.integers(5000, size=(700, 5000))].mean(axis=2)
    bounds = numpy.quantile((tuned - pruned) / (dense - pruned), [0.025, 0.975])
    assert fieller["interval"] == pytest.approx(list(bounds), abs=0.006)


def test_a_ratio_is_undefined_instead_of_infinite():
    random = numpy.random.default_rng(7)
    means = across_models.means(["a", "b", "c"], [random.random(50), random.random(50), numpy.zeros(50)])
    assert means.ratio({"a": 1}, {"c": 1}) == {"value": None, "interval": None}
    noisy = means.ratio({"a": 1}, {"a": 1, "b": -1}) if means.values[0] > means.values[1] else None
    noisy = noisy or means.ratio({"a": 1}, {"b": 1, "a": -1})
    assert noisy["interval"] is None and math.isfinite(noisy["value"])


def test_an_undefined_mean_does_not_affect_other_contrasts():
    one, many = across_models.means(["x"], [[1.0]]), across_models.means(["y"], [[1.0, 2.0, 3.0]])
    both = across_models.side_by_side([one, many])
    assert both.contrast({"y": 1})["interval"] is not None
    assert both.contrast({"x": 1})["interval"] is None
