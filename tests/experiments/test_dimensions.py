"""The behavioural dimension: the smallest number of directions that is enough, and its resamples."""

import numpy as np
import pytest

from helpers.evidence import resampling
from helpers.experiments.dimensions import Dimension, behavioural_dimension


def test_the_dimension_is_the_smallest_number_of_directions_that_is_enough():
    """Every resample agrees where every prompt says the same: 0.5 of the way at 1, 0.85 at 2, 0.9 at 4."""
    ends = {"base": np.zeros((2, 30)), "dpo": np.ones((2, 30))}
    steered = {k: np.full((2, 30), share) for k, share in ((4, 0.9), (1, 0.5), (2, 0.85))}
    found = behavioural_dimension(steered, ends, np.arange(30) // 3, ends["dpo"])
    assert found.measured == 2 and set(found.resampled) == {2} and len(found.resampled) == resampling.RESAMPLES
    assert str(found) == "2 (100%)"
    none = behavioural_dimension({1: steered[1]}, ends, np.arange(30) // 3, ends["dpo"])
    assert np.isnan(none.measured) and str(none) == "none (100%)"


def test_the_dimension_is_held_against_what_can_be_done_at_all():
    """A reference of 0.6: 0.48 of the way is enough, which 1 reaches; of 0.1 it is hardly any, and none is enough; and
    one that goes beyond the whole way asks for no more than the whole way does."""
    ends = {"base": np.zeros((1, 30)), "dpo": np.ones((1, 30))}
    steered = {k: np.full((1, 30), share) for k, share in ((1, 0.5), (2, 0.6))}
    against = [
        behavioural_dimension(steered, ends, np.arange(30), np.full((1, 30), reference)).measured
        for reference in (0.6, 0.7, 0.8, 0.1)
    ]
    assert against[:2] == [1, 2] and np.isnan(against[2:]).all()
    enough = {1: np.full((1, 30), 0.85)}
    assert behavioural_dimension(enough, ends, np.arange(30), np.full((1, 30), 1.3)).measured == 1


def test_the_dimension_is_of_means_over_what_was_judged():
    """A prompt without a judgement (nan) counts at neither end nor between."""
    ends = {"base": np.array([[0.0, 0, 0, 0]]), "dpo": np.array([[1.0, 1, 1, np.nan]])}
    steered = {1: np.array([[1.0, 0, np.nan, np.nan]]), 3: np.array([[1.0, 1, np.nan, 0]])}
    steered[8] = np.array([[1.0, np.nan, 1, 1]])
    found = behavioural_dimension(steered, ends, np.arange(4), ends["dpo"])
    assert found.measured == 8  # 1: a half, 3: two thirds


def test_resamples_of_the_dimension_are_of_groups_and_of_seeds():
    """By hand: groups and seeds drawn again, and the smallest k among those that reach 0.8 in each draw."""
    rng = np.random.default_rng(5)
    groups, ends = np.arange(60) // 5, {"base": np.zeros((3, 60)), "dpo": np.ones((3, 60))}
    quality = rng.normal(0, 0.3, 12)[groups] + rng.normal(0, 0.2, (3, 1))
    steered = {
        k: (rng.random((3, 60)) < centre + quality).astype(float) for k, centre in ((1, 0.6), (2, 0.8), (4, 0.9))
    }
    found = behavioural_dimension(steered, ends, groups, ends["dpo"])
    drawn = []
    for _ in range(3000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(0, 12, 12)])
        seeds = rng.integers(0, 3, 3)
        enough = [k for k in (1, 2, 4) if steered[k][np.ix_(seeds, rows)].mean() >= 0.8]
        drawn.append(enough[0] if enough else np.nan)
    for k in (1, 2, 4):
        assert np.mean(found.resampled == k) == pytest.approx(np.mean(np.array(drawn) == k), abs=0.04)


def test_a_dimension_names_what_nine_in_ten_resamples_are_among_the_likeliest_first():
    resampled = np.array([2.0] * 60 + [np.nan] * 35 + [4.0] * 5)
    assert str(Dimension(2.0, resampled)) == "2 (60%), none (35%)"
