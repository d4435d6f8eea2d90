"""Which pairs made v*: projections, AUROC, changed pairs and CHES against numpy loops, scikit-learn and brute force."""

import pickle

import numpy as np
import pytest
import torch
from conftest import random_vector, recorded
from scipy import stats
from sklearn.metrics import roc_auc_score
from studied import logp

from helpers import study
from helpers.experiments import influence
from helpers.lm.batches import Tokens
from helpers.lm.training import TrainingPair


def final_states(model, tokens) -> np.ndarray:
    """The states at `final` of a sequence by one plain forward pass, (tokens, d) float64."""
    with recorded(model, "model.layers") as found, torch.no_grad():
        model(input_ids=torch.tensor([tokens.ids]))
    return found["final"][0].numpy()


# --- Along a vector ---


def test_how_far_rows_lie_along_a_vector_is_as_a_loop_has_it():
    delta, v = random_vector(7, 5), random_vector(5, seed=1)
    length = sum(float(x) ** 2 for x in v) ** 0.5
    expected = [sum(float(a) * float(b) for a, b in zip(row, v)) / length for row in delta]
    np.testing.assert_allclose(influence.along(delta, v), expected, rtol=1e-6)
    np.testing.assert_allclose(influence.along(delta, 3 * v), expected, rtol=1e-6)


def test_the_difference_of_a_pair_is_that_of_its_answers_mean_states(trained, plain):
    found = influence.differences(trained)
    for i in (0, 5):
        chosen, rejected = (
            final_states(plain["base"], answers[i])[len(answers[i].prompt) :].mean(0)
            for answers in trained.encoded("heldin")
        )
        np.testing.assert_allclose(found[i], chosen - rejected, atol=1e-5)


# --- AUROC ---


def test_auroc_is_scikit_learns_and_that_of_known_cases():
    rng = np.random.default_rng(0)
    positive = rng.random(60) < 0.4
    scores = np.round(rng.normal(size=60) + positive, 1)  # with ties
    found = influence.auroc(scores, positive, np.arange(60))
    assert found.value == pytest.approx(roc_auc_score(positive, scores)) and found.low < found.value < found.high
    apart = influence.auroc(positive.astype(float), positive, np.arange(60))
    assert apart[:3] == (1, 1, 1)
    assert influence.auroc(np.zeros(60), positive, np.arange(60)).value == 0.5


@pytest.mark.parametrize("shared", [1, 6], ids=["of independent cases", "of cases in groups of six"])
def test_the_interval_of_auroc_is_about_that_of_a_brute_force_bootstrap(shared):
    rng = np.random.default_rng(1)
    n = 240 * shared
    groups, positive = np.arange(n) // shared, rng.random(n) < 0.5
    scores = 0.7 * positive + rng.normal(size=n) + rng.normal(size=240)[groups]
    found = influence.auroc(scores, positive, groups)
    drawn, members = [], [np.flatnonzero(groups == g) for g in range(240)]
    for _ in range(800):
        rows = np.concatenate([members[g] for g in rng.integers(0, 240, 240)])
        drawn.append(roc_auc_score(positive[rows], scores[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.high - found.low == pytest.approx(high - low, rel=0.12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.012)


# --- Changed pairs ---


def pair(i: int) -> TrainingPair:
    return TrainingPair(Tokens([1], [i]), Tokens([1], [100 + i]), (-float(i), -100.0 - i))


def test_the_top_tenth_is_the_top_tenth():
    scores = np.random.default_rng(0).normal(size=40)
    rows = influence.top_rows(scores)
    assert len(rows) == 4 and list(rows) == sorted(rows)
    assert scores[rows].min() > np.delete(scores, rows).max()
    assert len(influence.top_rows(scores[:3])) == 1


def test_a_random_tenth_is_its_draws_own():
    one, other = influence.random_rows(40, 0), influence.random_rows(40, 1)
    assert len(set(one)) == 4 and set(one) <= set(range(40)) and list(one) == sorted(one)
    assert list(one) == list(influence.random_rows(40, 0)) != list(other)


def test_pairs_are_left_out_or_swapped_with_their_base_log_probabilities():
    pairs, rows = [pair(i) for i in range(5)], np.array([1, 3])
    assert influence.changed(pairs, rows, "left out") == [pairs[0], pairs[2], pairs[4]]
    flipped = influence.changed(pairs, rows, "flipped")
    assert [flipped[i] for i in (0, 2, 4)] == [pairs[i] for i in (0, 2, 4)]
    for i in rows:
        assert flipped[i] == TrainingPair(pairs[i].rejected, pairs[i].chosen, (-100.0 - i, -float(i)))


@pytest.mark.parametrize("which", ["top", "random"])
def test_a_retrained_partner_goes_through_a_process_and_is_trained_on_the_changed_pairs(trained, which):
    one = influence.retrained(trained, "left out", which)
    kind, profile = pickle.loads(pickle.dumps((type(one), one.profile)))  # as study.compute hands it on
    again = kind(profile)
    scores = influence.along(influence.differences(trained), trained.direction())
    rows = np.argsort(-scores)[:2] if which == "top" else influence.random_rows(24, trained.profile.seed)
    expected = [pair for i, pair in enumerate(trained.training_pairs) if i not in rows]
    assert again.training_pairs == expected and len(expected) == 22
    assert again.recipe == trained.recipe and again.pairs == trained.pairs
    assert again.whole.chosen.adapter == trained.chosen.adapter


def test_the_partner_of_changed_pairs_is_another(trained):
    one = influence.retrained(trained, "flipped", "top")
    one.measure_alone()
    assert one.chosen.adapter.key != trained.chosen.adapter.key
    assert not torch.equal(one.direction(), trained.direction()) and one.strength().shape == (2, 8)


def test_beside_a_ready_partner_none_can_be_retrained(trained):
    files = {"model": str(trained.source.path), "dpo_model": str(trained.chosen.adapter.path)}
    ready = study.Study(trained.profile.replace(**files))
    with pytest.raises(ValueError, match="ready one"):
        influence.retrained(ready, "flipped", "top")


def test_one_beyond_draws_is_taken_for_a_further_draw():
    draws = np.repeat([[1.0], [2.0], [3.0]], 10, axis=1)  # prompts leave nothing open
    found = influence.beyond_draws(np.full(10, 5.0), draws, np.arange(10))
    half = stats.t.ppf(0.975, 2) * 1.0 * np.sqrt(4 / 3)
    assert found[:3] == pytest.approx((3.0, 3 - half, 3 + half))
    alike = influence.beyond_draws(np.arange(10.0), np.zeros((3, 10)), np.arange(10))
    assert alike.value == 4.5 and alike.high - alike.low == pytest.approx(
        2 * 1.96 * np.arange(10.0).std() / 10**0.5, 0.1
    )


# --- What states foretell ---


def test_ches_is_the_double_sum_of_its_definition(trained, plain):
    found = influence.by_pair(trained)
    for i in (0, 7):
        chosen, rejected = (
            final_states(plain["base"], answers[i])[len(answers[i].prompt) - 1 : -1]
            for answers in trained.encoded("heldin")
        )
        across = sum(float(h @ other) for h in chosen for other in rejected)
        within = sum(float(h @ other) for h in chosen for other in chosen)
        assert found["CHES"][i] == pytest.approx(across - within, abs=1e-3)
        n, m = len(chosen), len(rejected)
        assert found["CHES, means"][i] == pytest.approx(across / (n * m) - within / n**2, abs=1e-4)


def test_what_becomes_of_a_pair_s_likelihoods_is_that_of_plain_forward_passes(trained, plain):
    found = influence.by_pair(trained)
    for name, answers in zip(("chosen", "rejected"), trained.encoded("heldin")):
        base, dpo = (logp(plain[role], answers[3]) for role in ("base", "dpo"))
        assert found[f"log π {name}"][3] == pytest.approx(base, abs=1e-4)
        assert found[f"change, {name}"][3] == pytest.approx(dpo - base, abs=1e-4)
    both = [answers[3].response for answers in trained.encoded("heldin")]
    n = found["shared"][3]
    assert both[0][:n] == both[1][:n] and both[0][n] != both[1][n]
    assert len(found) == 24 and found["tokens"][3] == len(trained.encoded("heldin")[0][3].response)


def test_a_rank_correlation_is_scipys_and_none_where_nothing_varies():
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    y = x + rng.normal(size=80)
    found = influence.rank_correlation(x, y, np.arange(80))
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic) and found.low < found.value < found.high
    assert np.isnan(influence.rank_correlation(x, np.ones(80), np.arange(80)).value)
