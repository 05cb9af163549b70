"""Statistics of paired comparisons, checked against worked examples and scipy."""

import math

import numpy
import pytest
from scipy import stats

from coppice.stats import across_models, paired_stats


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


def test_bootstrap_interval_of_a_change_agrees_with_the_paired_t_interval():
    random = numpy.random.default_rng(0)
    before = (random.random(3000) < 0.5).astype(float)
    after = numpy.where(random.random(3000) < 0.1, 1.0, before)
    paired = paired_stats.paired_means([before, after])
    found = paired_stats.change(paired, 0, 1)
    expected = stats.ttest_rel(after, before).confidence_interval()
    assert found["value"] == pytest.approx((after - before).mean())
    assert found["interval"] == pytest.approx(list(expected), abs=0.002)


def test_resamples_both_stages_together():
    random = numpy.random.default_rng(0)
    before = random.normal(size=500)
    paired = paired_stats.paired_means([before, before + 1.0])
    assert paired_stats.change(paired, 0, 1)["interval"] == pytest.approx([1.0, 1.0])


def test_weighted_means_weigh_windows_by_their_tokens():
    paired = paired_stats.paired_means([[1.0, 4.0], [2.0, 2.0]], weights=[3, 1])
    assert list(paired.values) == [1.75, 2.0]


def test_the_mean_over_tasks_weighs_small_and_large_tasks_equally():
    large = paired_stats.paired_means([[1.0] * 90 + [0.0] * 10])
    small = paired_stats.paired_means([[1.0] * 5 + [0.0] * 5], seed=1)
    assert paired_stats.mean_of([large, small]).values[0] == pytest.approx(0.7)


def test_the_same_seed_gives_the_same_interval():
    samples = numpy.random.default_rng(1).random((3, 50))
    first, again = (paired_stats.paired_means(samples, seed=5) for _ in range(2))
    assert numpy.array_equal(first.distribution, again.distribution)


def test_one_item_has_no_interval_and_no_verdict():
    paired = paired_stats.paired_means([[1.0], [0.0], [1.0]])
    found = paired_stats.change(paired, 1, 2)
    assert found == {"value": 1.0, "interval": None}
    assert paired_stats.verdict_of_interval(found["interval"]) == "no clear change"
    assert paired_stats.recovered_fraction(paired, 0, 1, 2)["interval"] is None


def test_rejects_a_comparison_without_items():
    with pytest.raises(ValueError, match="no item"):
        paired_stats.paired_means([[], []])


def _levels(*means, noise=0.0, count=400):
    random = numpy.random.default_rng(2)
    shared = random.normal(size=count)
    rows = [mean + shared + noise * random.normal(size=count) for mean in means]
    return paired_stats.paired_means([row - row.mean() + mean for row, mean in zip(rows, means, strict=True)])


def test_recovered_fraction_of_a_worked_example():
    # lost 0.20, regained 0.15
    found = paired_stats.recovered_fraction(_levels(0.70, 0.50, 0.65, noise=0.05), 0, 1, 2)
    assert found["value"] == pytest.approx(0.75)
    assert found["interval"][0] < 0.75 < found["interval"][1]


def test_recovered_fraction_of_perplexity_counts_a_fall_as_a_recovery():
    paired = _levels(10.0, 30.0, 15.0, noise=0.05)
    assert paired_stats.recovered_fraction(paired, 0, 1, 2, higher_is_better=False)["value"] == pytest.approx(0.75)
    assert paired_stats.recovered_fraction(paired, 0, 1, 2)["value"] is None


@pytest.mark.parametrize("pruned", [0.7, 0.8])
def test_recovered_fraction_is_undefined_if_pruning_lost_nothing(pruned):
    found = paired_stats.recovered_fraction(_levels(0.7, pruned, 0.9), 0, 1, 2)
    assert found == {"value": None, "interval": None, "note": "pruning lost nothing"}


def test_recovered_fraction_has_no_interval_if_the_loss_is_within_noise():
    found = paired_stats.recovered_fraction(_levels(0.70, 0.69, 0.75, noise=1.0), 0, 1, 2)
    assert found["interval"] is None and "within noise" in found["note"]
    assert math.isfinite(found["value"])


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
    low, high = means.contrast({"a": 1, "b": -1})["interval"]
    assert ((high - low) / (2 * 1.959964)) ** 2 == pytest.approx(expected)


def test_fieller_agrees_with_the_bootstrap():
    random = numpy.random.default_rng(6)
    shared = random.random(5000)
    rows = [(shared < edge).astype(float) for edge in (0.8, 0.5, 0.7)]
    means = across_models.means(["dense", "pruned", "tuned"], rows)
    fieller = means.ratio({"tuned": 1, "pruned": -1}, {"dense": 1, "pruned": -1})
    bootstrap = paired_stats.recovered_fraction(paired_stats.paired_means(rows), 0, 1, 2)
    assert fieller["value"] == pytest.approx(bootstrap["value"])
    assert fieller["interval"] == pytest.approx(bootstrap["interval"], abs=0.005)


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
