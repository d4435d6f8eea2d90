"""Shares, intervals and dimensions against scipy, closed cases and resampling by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from helpers import estimates
from helpers.estimates import Estimate
from helpers.evidence import resampling


@pytest.mark.parametrize(
    "steered, start, goal, share",
    [
        (2, 2, 5, 0.0),
        (5, 2, 5, 1.0),
        (2.5, 1, 5, 0.375),
        (0, 1, 3, -0.5),
        (9, 1, 3, 4.0),
        (1.5, 2, 2, np.nan),
    ],
)
def test_recovered_share(steered, start, goal, share):
    np.testing.assert_allclose(estimates.recovered_share(steered, start, goal), share, equal_nan=True)
    stacked = estimates.recovered_share(*(np.array([mean, mean]) for mean in (steered, start, goal)))
    np.testing.assert_allclose(stacked, [share, share], equal_nan=True)


@pytest.mark.parametrize("remaining, share", [(0, 1.0), (2, 0.0), (0.5, 0.75), (4, -1.0)])
def test_removed_share(remaining, share):
    assert estimates.removed_share(remaining, 2) == share
    assert estimates.removed_share(np.full(3, remaining), np.full(3, 2)).tolist() == [share] * 3


# --- Intervals ---


def test_an_estimate_reads_as_a_value_and_its_interval():
    estimate = Estimate(0.5, 0.25, 0.754, (0.4, 0.6))
    assert str(estimate) == f"{estimate}" == "0.50 [0.25, 0.75]"
    assert f"{estimate:.3f}" == "0.500 [0.250, 0.754]"
    assert f"{Estimate(0.5, -0.25, 0.75):+.1f}" == "+0.5 [-0.2, +0.8]"
    assert Estimate(1, 0, 2).by_seed == ()


def test_an_interval_is_the_sample_s_normal_one_where_that_holds():
    sample = np.random.default_rng(3).normal(2, 5, 400)
    found = estimates.interval(estimates.mean, sample)
    assert found.value == pytest.approx(sample.mean()) and found.by_seed == ()
    assert found[1:3] == pytest.approx(stats.norm.interval(0.95, sample.mean(), sample.std() / 20), abs=0.05)


def test_without_groups_it_is_scipy_s_bootstrap_of_the_prompts():
    rng = np.random.default_rng(5)
    samples = [rng.normal(mean, 1, 60) for mean in (1, 0, 2)]

    def share(steered, start, goal, axis):
        return (steered.mean(axis) - start.mean(axis)) / (goal.mean(axis) - start.mean(axis))

    found = estimates.interval(estimates.recovered_share, *samples)
    scipys = stats.bootstrap(samples, share, paired=True, n_resamples=20_000, method="percentile", rng=rng)
    assert found.value == pytest.approx(share(*samples, 0))
    assert found[1:3] == pytest.approx(scipys.confidence_interval, abs=0.04)


def test_a_statistic_is_of_means_and_not_a_mean_of_ratios():
    part, whole = np.array([1.0, 0.0, 30.0]), np.array([1.0, 9.0, 30.0])
    assert estimates.interval(estimates.removed_share, part, whole).value == pytest.approx(1 - 31 / 40)


def test_an_interval_of_equal_values_is_a_point_and_pairs_stay_paired():
    assert estimates.interval(estimates.mean, np.full(9, 0.5)) == Estimate(0.5, 0.5, 0.5)
    a = np.random.default_rng(0).normal(size=50)
    assert estimates.interval(estimates.difference, a + 1, a)[:3] == pytest.approx((1, 1, 1))


def test_an_interval_is_deterministic_and_follows_its_seed():
    sample = np.random.default_rng(3).normal(size=60)
    assert estimates.interval(estimates.mean, sample, seed=4) == estimates.interval(estimates.mean, sample, seed=4)
    assert estimates.interval(estimates.mean, sample, seed=4) != estimates.interval(estimates.mean, sample, seed=5)


def test_an_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high, *_ = estimates.interval(estimates.mean, rng.exponential(size=80))
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_the_interval_of_a_share_resamples_all_its_samples_together():
    rng = np.random.default_rng(1)
    start, goal = rng.normal(size=40), rng.normal(3, size=40)
    found = estimates.interval(estimates.recovered_share, start + 0.5 * (goal - start), start, goal)
    assert found[:3] == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("n, groups, got", [(0, None, 0), (1, None, 1), (5, ["same"] * 5, 1)])
def test_an_interval_needs_two_prompts_that_differ_in_what_they_share(n, groups, got):
    with pytest.raises(ValueError, match=f"at least two prompts that differ in what they share, got {got}"):
        estimates.interval(estimates.mean, np.zeros(n), groups=groups)


# --- Crossed factors: the pigeonhole bootstrap ---

PLACES, PHRASINGS = np.repeat(np.arange(12), 8), np.tile(np.arange(8), 12)


def test_crossed_factors_are_drawn_by_themselves_and_a_value_counts_as_often_as_both_its_levels():
    """Against loops over resamples and prompts, with the same draws."""
    sample = np.random.default_rng(1).normal(size=96) + PLACES / 4
    sample[5] = np.nan
    found = estimates.interval(estimates.mean, sample, groups=[PLACES, PHRASINGS], seed=3)
    rng, means = np.random.default_rng(3), []
    drawn = [rng.multinomial(n, np.full(n, 1 / n), resampling.RESAMPLES) for n in (12, 8)]
    for places, phrasings in zip(*drawn):
        total = count = 0.0
        for value, place, phrasing in zip(sample, PLACES, PHRASINGS):
            if not np.isnan(value):
                weight = places[place] * phrasings[phrasing]
                total, count = total + weight * value, count + weight
        means.append(total / count)
    assert found[1:3] == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert found.value == pytest.approx(np.nanmean(sample))


def test_its_variance_is_that_of_crossed_random_effects_and_somewhat_more():
    """Var(mean) = s_a^2 / A + s_b^2 / B + s_e^2 / (AB); Owen 2007: it counts the last term up to three times."""
    rng, errors = np.random.default_rng(0), []
    a, b, e = 1.0, 0.7, 0.5
    for seed in range(40):
        sample = a * rng.normal(size=12)[PLACES] + b * rng.normal(size=8)[PHRASINGS] + e * rng.normal(size=96)
        _, low, high, *_ = estimates.interval(estimates.mean, sample, groups=[PLACES, PHRASINGS], seed=seed)
        errors.append(((high - low) / 3.92) ** 2)
    known = a**2 / 12 + b**2 / 8 + e**2 / 96
    assert 0.75 * known < np.mean(errors) < 1.2 * (known + 2 * e**2 / 96)


def test_the_jackknife_over_crossed_factors_adds_their_squared_errors():
    sample, parts = np.random.default_rng(2).normal(size=96), []
    for groups in (PLACES, PHRASINGS, [PLACES, PHRASINGS]):
        found = estimates.jackknife_interval(lambda rows: sample[rows].mean(), groups)
        parts.append(found.high - found.value)
    assert parts[2] == pytest.approx(np.hypot(*parts[:2]))


# --- Replicates, and many tests ---


def test_over_replicates_it_is_student_s_interval():
    values = [0.2, 0.5, 0.4, 0.9]
    found = estimates.across(values)
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found[:3] == pytest.approx((0.5, *expected)) and found.by_seed == tuple(values)
    with pytest.raises(ValueError, match="needs at least two, got 1"):
        estimates.across([0.5])


def test_a_p_value_is_that_of_the_interval_s_own_width():
    assert Estimate(1.0, 0.0, 2.0).p(0.0) == pytest.approx(0.05)
    assert Estimate(1.0, 0.5, 1.5).p(1.5) == pytest.approx(0.05) and Estimate(1.0, 0.0, 2.0).p(1.0) == 1
    assert (Estimate(1.0, 1.0, 1.0).p(0.9), Estimate(1.0, 1.0, 1.0).p(1.0)) == (0, 1)


def test_a_p_value_over_replicates_is_that_of_a_t_test():
    values = np.random.default_rng(0).normal(0.4, 0.5, 8)
    assert estimates.across(values).p(0) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_degrees_of_freedom_are_those_of_seeds_alone_and_grow_with_what_prompts_leave_open():
    """Satterthwaite's, of two variances of which one is known: (a + b)^2 / (a^2 / (n - 1))."""
    by_seed = np.array([[0.2], [0.5], [0.9]])
    assert estimates.across(by_seed[:, 0]).df == pytest.approx(2)
    sample = by_seed + np.random.default_rng(0).normal(0, 1, 50)
    found = estimates.interval(estimates.mean, sample)
    of_seeds, of_prompts = np.var(sample.mean(1), ddof=1) / 3, sample[0].var() / 50
    assert found.df == pytest.approx((of_seeds + of_prompts) ** 2 / (of_seeds**2 / 2), rel=0.1)
    assert estimates.interval(estimates.mean, sample[0]).df == np.inf


def test_holm_s_adjustment_of_worked_cases():
    assert estimates.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert estimates.holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0} and estimates.holm({}) == {}


# --- Groups: prompts that share a wording ---


def test_a_group_of_equal_values_counts_as_one_prompt():
    """Five copies of each prompt say no more than the prompt: the same interval, wider than that of 5 N prompts."""
    once = np.random.default_rng(2).normal(size=30)
    copies, wordings = np.repeat(once, 5), np.repeat([f"wording {i:02d}" for i in range(30)], 5)
    grouped = estimates.interval(estimates.mean, copies, groups=wordings)
    assert grouped[:3] == pytest.approx(estimates.interval(estimates.mean, once)[:3])
    alone = estimates.interval(estimates.mean, copies)
    assert grouped.high - grouped.low == pytest.approx(np.sqrt(5) * (alone.high - alone.low), rel=0.1)


def test_groups_are_drawn_whole_whatever_their_sizes_and_their_order():
    """Against drawing labels by hand, the rows of each label drawn taken as they are."""
    rng = np.random.default_rng(4)
    groups = rng.permutation(np.repeat(list("abcdefghijkl"), rng.integers(1, 9, 12)))
    x, y = rng.normal(size=(2, len(groups))) + (groups < "f")
    found = estimates.interval(estimates.difference, x, y / 2, groups=groups)
    assert found.value == pytest.approx(x.mean() - y.mean() / 2)  # over prompts, not over groups
    by_hand = []
    for _ in range(5000):
        rows = np.concatenate([np.flatnonzero(groups == label) for label in rng.choice(np.unique(groups), 12)])
        by_hand.append(x[rows].mean() - y[rows].mean() / 2)
    low, high = np.quantile(by_hand, [0.025, 0.975])
    assert found[1:3] == pytest.approx((low, high), abs=0.07 * (high - low))


def test_with_groups_it_covers_where_prompts_of_a_wording_resemble_each_other():
    """Random effects: every wording has a level of its own. Taken for independent, prompts say far too much."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), rng.integers(3, 10, 40))
    covered = np.zeros(2)
    for _ in range(150):
        sample = rng.normal(size=40)[groups] + rng.normal(size=len(groups))
        for i, given in enumerate((groups, None)):
            _, low, high, *_ = estimates.interval(estimates.mean, sample, groups=given)
            covered[i] += low <= 0 <= high
    assert 0.88 <= covered[0] / 150 <= 0.98
    assert covered[1] / 150 < 0.8


# --- Training seeds and values that are not there ---


def test_over_seeds_a_statistic_is_averaged_and_its_value_for_each_is_kept():
    rng = np.random.default_rng(6)
    steered, goal, start = rng.normal(1, 1, (3, 40)), rng.normal(2, 1, (3, 40)), rng.normal(size=40)
    groups = np.repeat(np.arange(10), 4)
    found = estimates.interval(estimates.recovered_share, steered, start, goal, groups=groups)
    each = [estimates.interval(estimates.recovered_share, s, start, g, groups=groups) for s, g in zip(steered, goal)]
    assert found.by_seed == pytest.approx([one.value for one in each])
    assert found.value == pytest.approx(np.mean(found.by_seed)) and found.low < found.value < found.high
    by_hand = (steered.mean(1) - start.mean()) / (goal.mean(1) - start.mean())
    assert found.by_seed == pytest.approx(by_hand.tolist())


def of_seeds(by_seed) -> float:
    """The half-width of the t interval of a few seeds' values."""
    return stats.t.ppf(0.975, len(by_seed) - 1) * stats.sem(by_seed)


def test_seeds_share_the_prompts_drawn():
    """Three equal seeds say no more than one; two opposite ones cancel in every draw, which leaves the seeds' part."""
    sample = np.random.default_rng(8).normal(1, 1, 50)
    found = estimates.interval(estimates.mean, np.stack([sample] * 3))
    assert found[:3] == pytest.approx(estimates.interval(estimates.mean, sample)[:3])
    opposite = estimates.interval(estimates.mean, np.stack([sample, -sample]))
    half = of_seeds([sample.mean(), -sample.mean()])
    assert opposite[:3] == pytest.approx((0, -half, half), abs=1e-9)


def test_what_prompts_and_what_seeds_leave_open_add_in_quadrature():
    """Each by itself: of the mean over seeds the bootstrap over prompts, and of the seeds' means the t interval."""
    rng = np.random.default_rng(10)
    samples = rng.exponential(size=(3, 40)) + rng.exponential(size=40) + np.array([[0.0], [0.1], [0.4]])
    groups = np.repeat(np.arange(10), 4)
    found = estimates.interval(estimates.mean, samples, groups=groups)
    value, low, high, *_ = estimates.interval(estimates.mean, samples.mean(0), groups=groups)
    half = of_seeds(samples.mean(1))
    assert found.low == pytest.approx(value - np.hypot(value - low, half))
    assert found.high == pytest.approx(value + np.hypot(high - value, half))


def test_over_seeds_it_covers_where_every_training_ends_elsewhere():
    """The value to cover is that of all prompts and all trainings; for the prompts alone three trainings are all."""
    rng, covered = np.random.default_rng(1), np.zeros(2)
    for _ in range(150):
        samples = rng.normal(size=(3, 1)) + rng.normal(size=60) + 0.3 * rng.normal(size=(3, 60))
        for i, found in enumerate(estimates.interval(estimates.mean, s) for s in (samples, samples.mean(0))):
            covered[i] += found.low <= 0 <= found.high
    assert covered[0] / 150 >= 0.92
    assert covered[1] / 150 < 0.6


def test_values_that_are_not_there_are_left_out_of_a_mean():
    sample = np.random.default_rng(9).normal(size=40)
    sample[::7] = np.nan
    found = estimates.interval(estimates.mean, sample, seed=3)
    assert found.value == pytest.approx(np.nanmean(sample))
    there = sample[~np.isnan(sample)]
    assert found[1:3] == pytest.approx(estimates.interval(estimates.mean, there)[1:3], abs=0.06)


def test_a_group_s_weight_is_the_number_of_its_values_that_are_there():
    """A wording whose other prompts have no value is a wording of one prompt."""
    whole = np.array([1.0, 5.0, 2.0, 4.0, 9.0])
    holes = np.array([1.0, np.nan, 5.0, 2.0, np.nan, 4.0, 9.0])
    found = estimates.interval(estimates.mean, holes, groups=[*"aabbccc"])
    assert found[:3] == pytest.approx(estimates.interval(estimates.mean, whole, groups=[*"abbcc"])[:3])


# --- Wilson's interval and the jackknife ---


def wilson(p: float, n: int) -> tuple[float, float]:
    z = stats.norm.ppf(0.975)
    middle, half = (p + z**2 / (2 * n)), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


@pytest.mark.parametrize("ones, n", [(240, 240), (0, 50), (37, 120)])
def test_a_share_s_interval_is_wilson_s(ones, n):
    found = estimates.share_interval(np.array([1.0] * ones + [0.0] * (n - ones)))
    assert (found.value, found.by_seed) == (ones / n, ())
    assert found[1:3] == pytest.approx(wilson(ones / n, n), abs=1e-12)
    assert found.high - found.low > 0.01


def test_a_share_over_seeds_is_their_mean_for_as_many_prompts_as_there_are():
    """Three seeds are not three times the prompts."""
    sample = np.zeros((3, 60), dtype=bool)
    for seed, ones in enumerate((60, 51, 54)):
        sample[seed, :ones] = True
    found = estimates.share_interval(sample)
    assert found.by_seed == (1.0, 0.85, 0.9) and found.value == pytest.approx(55 / 60)
    (low, high), half = wilson(55 / 60, 60), of_seeds(found.by_seed)
    assert found.low == pytest.approx(55 / 60 - np.hypot(55 / 60 - low, half))
    assert found.high == pytest.approx(min(1, 55 / 60 + np.hypot(high - 55 / 60, half)))


@pytest.mark.parametrize("ones", [(1, 0, 0), (49, 50, 50), (7, 8, 8), (50, 50, 50)])
def test_a_share_lies_in_its_interval_where_the_mean_count_is_no_whole_number(ones):
    """What the prompts leave open is that of the whole number below or above, or between."""
    value, low, high, by_seed, _ = estimates.share_interval(np.arange(50) < np.array(ones)[:, None])
    assert value == pytest.approx(sum(ones) / 150) and low <= value <= high
    near = [wilson(k / 50, 50) for k in (sum(ones) // 3, -(-sum(ones) // 3))]
    for end, found in enumerate((low, high)):
        reach = sorted(np.hypot(value - ends[end], of_seeds(by_seed)) for ends in near)
        room = value if end == 0 else 1 - value
        assert min(room, reach[0]) - 1e-9 <= abs(found - value) <= min(room, reach[1]) + 1e-9


def test_a_share_over_seeds_has_no_interval_beyond_0_and_1():
    sample = np.arange(240) >= np.array([4, 1, 0])[:, None]
    for found in map(estimates.share_interval, (sample, ~sample)):
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_an_estimate_is_cut_to_the_values_that_there_are():
    assert Estimate(0.9, 0.7, 1.2, (0.8, 1.0)).clipped(0, 1) == Estimate(0.9, 0.7, 1, (0.8, 1.0))
    assert Estimate(0.1, -0.2, 0.3).clipped(0, 1) == Estimate(0.1, 0, 0.3)


@pytest.mark.filterwarnings("ignore")
def test_an_infinite_value_is_not_taken_for_a_large_one():
    assert not np.isfinite(estimates.interval(estimates.mean, np.array([1.0, np.inf, 2.0])).value)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """With every row its own group: the interval of the t test."""
    sample = np.random.default_rng(0).standard_normal(50)
    found = estimates.jackknife_interval(lambda rows: sample[rows].mean(), np.arange(50))
    assert found[:3] == pytest.approx((sample.mean(), *stats.ttest_1samp(sample, 0).confidence_interval(0.95)))
    assert found.by_seed == ()


def test_the_jackknife_with_groups_of_one_is_the_formula_of_efron_and_stein():
    sample = np.random.default_rng(1).exponential(size=12)
    found = estimates.jackknife_interval(lambda rows: np.log(sample[rows].mean()), [*"abcdefghijkl"])
    without = np.array([np.log(np.delete(sample, i).mean()) for i in range(12)])
    error = stats.t.ppf(0.975, 11) * np.sqrt(11 / 12 * ((without - without.mean()) ** 2).sum())
    value = np.log(sample.mean())
    assert found[:3] == pytest.approx((value, value - error, value + error))


def test_the_jackknife_over_equal_groups_is_the_t_interval_of_their_means():
    rng = np.random.default_rng(2)
    groups = rng.permutation(np.repeat([*"klmnopqr"], 6))
    sample = rng.normal(size=48) + (groups > "n")
    found = estimates.jackknife_interval(lambda rows: sample[rows].mean(), groups)
    means = [sample[groups == label].mean() for label in "klmnopqr"]
    assert found[:3] == pytest.approx((sample.mean(), *stats.ttest_1samp(means, 0).confidence_interval(0.95)))


def test_the_jackknife_leaves_out_one_group_at_a_time_and_keeps_the_order_of_the_rows():
    groups, seen = ["b", "a", "b", "c", "a"], []
    estimates.jackknife_interval(lambda rows: seen.append(rows.tolist()) or 0.0, groups)
    assert seen == [[0, 1, 2, 3, 4], [0, 2, 3], [1, 3, 4], [0, 1, 2, 4]]


def test_the_jackknife_averages_over_seeds_that_lose_the_same_rows():
    rng = np.random.default_rng(3)
    samples, groups = rng.normal(size=(3, 30)), np.repeat(np.arange(10), 3)
    found = estimates.jackknife_interval(lambda rows: [sample[rows].mean() for sample in samples], groups)
    mean = estimates.jackknife_interval(lambda rows: samples.mean(0)[rows].mean(), groups)
    assert found.by_seed == pytest.approx(samples.mean(1).tolist()) and mean.by_seed == ()
    half = np.hypot(mean.high - mean.value, of_seeds(found.by_seed))
    assert found[:3] == pytest.approx((mean.value, mean.value - half, mean.value + half))


def test_the_jackknife_covers_a_spectrum_s_ratio():
    """95 % intervals of sigma2 / sigma1 over 60 draws of rows hold the value of very many rows nearly always."""
    scales = np.array([3.0, 1.0, 0.5])

    def ratio(matrix):
        values = np.linalg.svd(matrix, compute_uv=False)
        return values[1] / values[0]

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        matrix = rng.standard_normal((80, 3)) * scales
        found = estimates.jackknife_interval(lambda rows, matrix=matrix: ratio(matrix[rows]), np.arange(80))
        covered += found.low <= 1 / 3 <= found.high
    assert covered >= 52


def test_a_share_leaves_out_what_is_not_there():
    known, with_gaps = np.array([1.0, 0, 1, 1]), np.array([1, np.nan, 0, 1, np.nan, 1])
    assert estimates.share_interval(with_gaps) == estimates.share_interval(known)


def test_alike_zeros_and_ones_get_wilson_s_interval_and_others_the_bootstrap_s():
    mixed, groups = np.array([1.0, 0, 1, 1, 0, 1]), [*"aabbcc"]
    assert estimates.rate(np.ones(40)) == estimates.share_interval(np.ones(40)) and estimates.rate(np.ones(40)).low < 1
    assert estimates.rate(mixed, groups) == estimates.interval(estimates.mean, mixed, groups=groups)


# --- How far from one model to the other ---


def two_ends(seeds=3, n=40):
    """What base and DPO do, where half of the prompts move, and a model that goes a part of the way."""
    rng = np.random.default_rng(0)
    base, dpo = rng.random((seeds, n)) < 0.2, rng.random((seeds, n)) < 0.9
    steered = np.where(rng.random((seeds, n)) < 0.5, dpo, base)
    return {"base": base.astype(float), "dpo": dpo.astype(float)}, steered.astype(float), np.arange(n) // 4


def test_what_is_recovered_from_the_base_is_left_to_restore_from_dpo():
    """Halfway from either end is halfway."""
    ends, steered, groups = two_ends()
    recovered, restored = (estimates.share_of_the_way(role, steered, ends, groups) for role in ("base", "dpo"))
    means = {role: x.mean(1) for role, x in ends.items()}
    by_hand = (steered.mean(1) - means["base"]) / (means["dpo"] - means["base"])
    assert recovered.by_seed == pytest.approx(by_hand.tolist())
    assert recovered.value + restored.value == pytest.approx(1)
    swapped = estimates.share_of_the_way("base", steered, {"base": ends["dpo"], "dpo": ends["base"]}, groups)
    assert swapped == restored and recovered.low < recovered.value < recovered.high


def test_where_nothing_moved_the_share_is_bounded_by_wilson_s_interval_for_none_in_as_many_groups():
    groups = np.repeat(np.arange(10), 4)
    ends = {"base": np.zeros((2, 40)), "dpo": np.tile([1.0, 0], (2, 20))}  # DPO moves half of the answers
    plain = estimates.share_of_the_way("base", ends["base"], ends, groups)
    bounded = estimates.share_of_the_way("base", ends["base"], ends, groups, bounded=True)
    assert plain[:3] == (0, 0, 0)
    assert bounded[:2] == (0, 0) and bounded.high == pytest.approx(wilson(0, 10)[1] / 0.5)
    assert estimates.share_of_the_way("dpo", ends["dpo"], ends, groups, bounded=True) == bounded
    ends, steered, groups = two_ends()  # one that has a width keeps it
    assert estimates.share_of_the_way("dpo", steered, ends, groups, bounded=True) == estimates.share_of_the_way(
        "dpo", steered, ends, groups
    )


def test_a_difference_of_independent_estimates_adds_their_half_widths_in_quadrature():
    one, other = Estimate(5.0, 2.0, 9.0, (4.0, 6.0)), Estimate(1.0, 0.0, 5.0, (0.5, 1.5))
    found = estimates.independent_difference(one, other)
    assert found == Estimate(4.0, 4 - 5.0, 4 + np.hypot(4, 1), (3.5, 4.5))
    assert estimates.independent_difference(one._replace(df=2), other).df == 2


def test_values_are_those_of_the_rows_asked_for_in_the_order_of_prompts():
    table = pd.DataFrame(
        {
            "prompt": [2, 0, 1, 0, 1, 2],
            "arm": [0, 0, 0, 1, 1, 1],
            "role": ["a"] * 6,
            "x": [2.0, 0.0, np.nan, 10, 11, 12],
        }
    )
    assert estimates.by_prompt(table, "x", arm=1, role="a").tolist() == [10, 11, 12]
    first = estimates.by_prompt(table, "x", arm=0)
    assert first[[0, 2]].tolist() == [0, 2] and np.isnan(first[1])
    assert estimates.by_prompt(table, "x", arm=7).tolist() == []
    with pytest.raises(ValueError, match=r"several rows where \{'role': 'a'\}: name one arm"):
        estimates.by_prompt(table, "x", role="a")


def test_how_much_further_one_goes_is_the_difference_of_their_shares_of_the_way():
    ends, steered, groups = two_ends()
    start, goal = ends["base"], ends["dpo"]
    found = estimates.interval(estimates.further_on, steered, start, start, goal, groups=groups)
    alone = estimates.share_of_the_way("base", steered, ends, groups)
    assert found[:3] == pytest.approx(alone[:3])  # the other goes nowhere
    assert estimates.interval(estimates.further_on, steered, steered, start, goal, groups=groups)[:3] == (0, 0, 0)
