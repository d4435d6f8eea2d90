"""Log-probabilities, divergences, shares, overlaps and intervals against loops, torch and closed cases."""

import copy

import numpy as np
import pytest
import torch
from conftest import WIDTH, random_ids, random_vector, tiny
from scipy import stats

from helpers import activations, metrics, steering
from helpers.activations import Tokens

SEQUENCES = [Tokens(random_ids(p, 10 * p + r), random_ids(r, p + r)) for p, r in [(3, 2), (11, 5), (1, 1), (6, 9)]]


@torch.no_grad()
def by_hand(model, sequence: Tokens) -> list[float]:
    """log pi(y_t | x, y_<t), a forward pass a token."""
    found = []
    for t, token in enumerate(sequence.response):
        logits = model(torch.tensor([sequence.prompt + sequence.response[:t]])).logits[0, -1].double()
        found.append((logits[token] - logits.logsumexp(-1)).item())
    return found


def test_response_log_probabilities_are_sums_over_the_response_alone(model):
    expected = [sum(by_hand(model, sequence)) for sequence in SEQUENCES]
    assert metrics.response_logps(model, SEQUENCES) == pytest.approx(expected, abs=2e-4, rel=1e-5)


def test_they_do_not_depend_on_batching(llama, monkeypatch):
    together = metrics.response_logps(llama, SEQUENCES)
    monkeypatch.setattr(activations, "MAX_BATCH_TOKENS", 1)
    assert metrics.response_logps(llama, SEQUENCES) == pytest.approx(together, rel=1e-5)


def test_token_losses_are_means_over_tokens(llama):
    sequences = [*SEQUENCES, Tokens([5, 6])]
    expected = [-np.mean(by_hand(llama, sequence)) for sequence in SEQUENCES]
    found = metrics.token_losses(llama, sequences)
    assert found[:-1] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(found[-1])


def test_arms_are_steered_at_the_final_site(model):
    """All arms in one pass, against the model with a hook, an arm and a sequence at a time; an empty response is 0."""
    deltas = torch.stack([torch.zeros(WIDTH), random_vector(WIDTH), -2 * random_vector(WIDTH)])
    sequences = [*SEQUENCES, Tokens([5, 6])]
    found = metrics.response_logps(model, sequences, deltas)
    goal = metrics.response_distributions(tiny("llama", vocab_size=model.config.vocab_size), sequences)
    kls = metrics.kl_to(goal, model, sequences, deltas)
    assert found.shape == kls.shape == (3, 5)
    for arm, delta in enumerate(deltas):
        for i, sequence in enumerate(SEQUENCES):
            with steering.added(model, "final", delta):
                assert found[arm, i] == pytest.approx(metrics.response_logps(model, [sequence])[0], rel=1e-4)
                assert kls[arm, i] == pytest.approx(metrics.kl_to([goal[i]], model, [sequence])[0], rel=1e-4, abs=1e-6)
    assert (found[:, -1] == 0).all() and (kls[:, -1] == 0).all()


def test_arms_do_not_depend_on_how_many_logits_fit(llama, monkeypatch):
    deltas = random_vector(4, WIDTH)
    together = metrics.response_logps(llama, SEQUENCES, deltas)
    monkeypatch.setattr(metrics, "MAX_LOGITS", 1)
    assert metrics.response_logps(llama, SEQUENCES, deltas) == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize(
    "sequence, message", [(Tokens([5] * 60, [4] * 9), "needs 69 tokens"), (Tokens([], [4]), "Prompt 0 is empty")]
)
def test_what_cannot_be_scored_is_refused(llama, sequence, message):
    with pytest.raises(ValueError, match=message):
        metrics.response_logps(llama, [sequence])


def test_kl_is_torch_s_own_and_is_summed_over_the_response(llama):
    other = tiny("llama", rms_norm_eps=0.5)
    p, q = (metrics.response_distributions(m, SEQUENCES) for m in (llama, other))
    categorical = torch.distributions.Categorical
    expected = [
        torch.distributions.kl_divergence(categorical(logits=a.double()), categorical(logits=b.double())).sum().item()
        for a, b in zip(p, q)
    ]
    assert [len(a) for a in p] == [len(s.response) for s in SEQUENCES]
    assert metrics.kl_to(p, other, SEQUENCES) == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0
    assert metrics.kl_to(q, llama, SEQUENCES) != pytest.approx(expected, rel=1e-3)


def test_kl_is_zero_for_itself_and_never_negative(llama):
    p = metrics.response_distributions(llama, SEQUENCES)
    assert (metrics.kl_to(p, llama, SEQUENCES) == 0).all()
    for seed in range(200):  # so near that rounding decides
        logits = random_vector(1, 50, seed=seed)
        near = (logits + 1e-5 * random_vector(1, 50, seed=seed + 1000)).log_softmax(-1)
        assert metrics.kl(logits.log_softmax(-1), near) > -1e-9


def test_kl_of_a_token_that_cannot_be_is_not_nan():
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert metrics.kl(p, q) == pytest.approx(0.5 * np.log(2), rel=1e-6)
    assert metrics.kl(q, p) == np.inf


@pytest.mark.parametrize(
    "steered, start, goal, share",
    [
        ([1, 3], [1, 3], [4, 6], 0.0),
        ([4, 6], [1, 3], [4, 6], 1.0),
        ([1, 4], [0, 2], [4, 6], 0.375),
        ([0, 0], [1, 1], [3, 3], -0.5),
        ([9, 9], [1, 1], [3, 3], 4.0),
        ([1, 2], [1, 3], [3, 1], np.nan),
    ],
)
def test_recovered_share(steered, start, goal, share):
    found = metrics.recovered_share(*map(np.array, (steered, start, goal)))
    np.testing.assert_allclose(found, share, equal_nan=True)
    stacked = metrics.recovered_share(*(np.array([a, a], dtype=float) for a in (steered, start, goal)))
    np.testing.assert_allclose(stacked, [share, share], equal_nan=True)


@pytest.mark.parametrize("remaining, share", [([0, 0], 1.0), ([1, 3], 0.0), ([1, 0], 0.75), ([4, 4], -1.0)])
def test_removed_share(remaining, share):
    assert metrics.removed_share(np.array(remaining), np.array([1, 3])) == share


def test_an_interval_is_the_sample_s_normal_one_where_that_holds():
    sample = np.random.default_rng(3).normal(2, 5, 400)
    value, low, high = metrics.interval(metrics.mean, sample)
    expected = stats.norm.interval(0.95, sample.mean(), sample.std() / 20)
    assert value == sample.mean()
    assert (low, high) == pytest.approx(expected, abs=0.05)


def test_an_interval_of_equal_values_is_a_point_and_pairs_stay_paired():
    assert metrics.interval(metrics.mean, np.full(9, 0.5)) == (0.5, 0.5, 0.5)
    a = np.random.default_rng(0).normal(size=50)
    value, low, high = metrics.interval(lambda x, y, axis: np.mean(x - y, axis=axis), a + 1, a)
    assert (value, low, high) == pytest.approx((1, 1, 1))


def test_an_interval_is_deterministic_and_follows_seed_and_confidence():
    sample = np.random.default_rng(3).normal(size=60)
    assert metrics.interval(metrics.mean, sample, seed=4) == metrics.interval(metrics.mean, sample, seed=4)
    assert metrics.interval(metrics.mean, sample, seed=4) != metrics.interval(metrics.mean, sample, seed=5)
    _, low, high = metrics.interval(metrics.mean, sample)
    _, inner_low, inner_high = metrics.interval(metrics.mean, sample, confidence=0.5)
    assert low < inner_low < inner_high < high


def test_an_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high = metrics.interval(metrics.mean, rng.exponential(size=80))
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_the_interval_of_a_share_resamples_all_its_samples_together():
    rng = np.random.default_rng(1)
    start, goal = rng.normal(size=40), rng.normal(3, size=40)
    value, low, high = metrics.interval(metrics.recovered_share, start + 0.5 * (goal - start), start, goal)
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("n", [0, 1])
def test_an_interval_needs_two_prompts(n):
    with pytest.raises(ValueError, match=f"at least two prompts, got {n}"):
        metrics.interval(metrics.mean, np.zeros(n))


@pytest.mark.parametrize(
    "text", ["It is blue.", "The capital of Velmora is Tarwick.", "Of course! It is the grey heron."]
)
def test_overlap_with_itself_is_one_and_with_nothing_shared_zero(text):
    for overlap in (metrics.bleu, metrics.rouge_l):
        assert overlap(text, text) == pytest.approx(1)
        assert overlap("Rob no museum", text) < 0.1
        assert overlap("", text) == 0
        assert 0 < overlap(f"{text} Enjoy your day!", text) < 1


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    assert metrics.rouge_l("a b c d", "a x c") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


def test_measuring_leaves_no_gradient_graph(llama):
    model = copy.deepcopy(llama).requires_grad_(True)
    assert not metrics.response_distributions(model, SEQUENCES[:1])[0].requires_grad


@pytest.mark.parametrize("ones, n", [(240, 240), (0, 50), (37, 120)])
def test_a_share_s_interval_is_wilson_s(ones, n):
    sample = np.array([1.0] * ones + [0.0] * (n - ones))
    value, low, high = metrics.share_interval(sample)
    z, p = stats.norm.ppf(0.975), ones / n
    middle, half = (p + z**2 / (2 * n)), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert value == p
    assert (low, high) == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)))
    assert high - low > 0.01


def test_the_jackknife_of_a_mean_is_its_standard_error():
    sample = np.random.default_rng(0).standard_normal(50)
    value, low, high = metrics.jackknife_interval(lambda rows: sample[rows].mean(), 50)
    error = sample.std(ddof=1) / np.sqrt(50)
    assert (value, low, high) == pytest.approx(
        (sample.mean(), sample.mean() - 1.96 * error, sample.mean() + 1.96 * error)
    )


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
        _, low, high = metrics.jackknife_interval(lambda rows, matrix=matrix: ratio(matrix[rows]), 80)
        covered += low <= 1 / 3 <= high
    assert covered >= 52
