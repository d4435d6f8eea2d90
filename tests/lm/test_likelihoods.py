"""Log-probabilities and divergences against loops, torch and closed cases."""

import copy
import io

import numpy as np
import pytest
import torch
from conftest import WIDTH, random_ids, random_vector, tiny
from tqdm import tqdm

from helpers.lm import batches, likelihoods, steering
from helpers.lm.batches import Tokens

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
    assert likelihoods.response_logps(model, SEQUENCES) == pytest.approx(expected, abs=2e-4, rel=1e-5)


def test_they_do_not_depend_on_batching(llama, monkeypatch):
    together = likelihoods.response_logps(llama, SEQUENCES)
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)
    assert likelihoods.response_logps(llama, SEQUENCES) == pytest.approx(together, rel=1e-5)


def test_token_losses_are_means_over_tokens(llama):
    sequences = [*SEQUENCES, Tokens([5, 6])]
    expected = [-np.mean(by_hand(llama, sequence)) for sequence in SEQUENCES]
    found = likelihoods.token_losses(llama, sequences)
    assert found[:-1] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(found[-1])


def test_arms_are_steered_at_the_final_site(model):
    """All arms in one pass, against the model with a hook, an arm and a sequence at a time; an empty response is 0."""
    deltas = torch.stack([torch.zeros(WIDTH), random_vector(WIDTH), -2 * random_vector(WIDTH)])
    sequences = [*SEQUENCES, Tokens([5, 6])]
    found = likelihoods.response_logps(model, sequences, deltas)
    goal = likelihoods.response_distributions(tiny("llama", vocab_size=model.config.vocab_size), sequences)
    kls = likelihoods.kl_to(goal, model, sequences, deltas)
    assert found.shape == kls.shape == (3, 5)
    for arm, delta in enumerate(deltas):
        for i, sequence in enumerate(SEQUENCES):
            with steering.added(model, "final", delta):
                assert found[arm, i] == pytest.approx(likelihoods.response_logps(model, [sequence])[0], rel=1e-4)
                assert kls[arm, i] == pytest.approx(
                    likelihoods.kl_to([goal[i]], model, [sequence])[0], rel=1e-4, abs=1e-6
                )
    assert (found[:, -1] == 0).all() and (kls[:, -1] == 0).all()


def test_every_sequence_may_have_a_delta_of_its_own(model):
    deltas = random_vector(2, len(SEQUENCES), WIDTH)
    found = likelihoods.response_logps(model, SEQUENCES, deltas)
    for i in range(len(SEQUENCES)):
        assert found[:, i] == pytest.approx(likelihoods.response_logps(model, SEQUENCES, deltas[:, i])[:, i], rel=1e-4)
    assert (found[0] != found[1]).all()


def test_arms_do_not_depend_on_how_many_logits_fit(llama, monkeypatch):
    deltas = random_vector(4, WIDTH)
    together = likelihoods.response_logps(llama, SEQUENCES, deltas)
    monkeypatch.setattr(likelihoods, "MAX_LOGITS", 1)
    assert likelihoods.response_logps(llama, SEQUENCES, deltas) == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize(
    "sequence, message", [(Tokens([5] * 60, [4] * 9), "needs 69 tokens"), (Tokens([], [4]), "Prompt 0 is empty")]
)
def test_what_cannot_be_scored_is_refused(llama, sequence, message):
    with pytest.raises(ValueError, match=message):
        likelihoods.response_logps(llama, [sequence])


def test_kl_is_torch_s_own_and_is_summed_over_the_response(llama):
    other = tiny("llama", rms_norm_eps=0.5)
    p, q = (likelihoods.response_distributions(m, SEQUENCES) for m in (llama, other))
    categorical = torch.distributions.Categorical
    expected = [
        torch.distributions.kl_divergence(categorical(logits=a.double()), categorical(logits=b.double())).sum().item()
        for a, b in zip(p, q)
    ]
    assert [len(a) for a in p] == [len(s.response) for s in SEQUENCES]
    assert likelihoods.kl_to(p, other, SEQUENCES) == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0
    assert likelihoods.kl_to(q, llama, SEQUENCES) != pytest.approx(expected, rel=1e-3)


def test_kl_is_zero_for_itself_and_never_negative(llama):
    p = likelihoods.response_distributions(llama, SEQUENCES)
    assert (likelihoods.kl_to(p, llama, SEQUENCES) == 0).all()
    for seed in range(200):  # so near that rounding decides
        logits = random_vector(1, 50, seed=seed)
        near = (logits + 1e-5 * random_vector(1, 50, seed=seed + 1000)).log_softmax(-1)
        assert likelihoods.kl(logits.log_softmax(-1), near) > -1e-9


def test_kl_of_a_token_that_cannot_be_is_not_nan():
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert likelihoods.kl(p, q) == pytest.approx(0.5 * np.log(2), rel=1e-6)
    assert likelihoods.kl(q, p) == np.inf


def test_measuring_leaves_no_gradient_graph(llama):
    model = copy.deepcopy(llama).requires_grad_(True)
    assert not likelihoods.response_distributions(model, SEQUENCES[:1])[0].requires_grad


def test_named_progress_counts_every_sequence_and_unnamed_shows_nothing(llama, monkeypatch):
    bars = []

    class Noted(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, file=io.StringIO(), **kwargs)
            bars.append(self)

    monkeypatch.setattr(likelihoods, "tqdm", Noted)
    goal = likelihoods.response_distributions(llama, SEQUENCES, "goal")
    likelihoods.response_logps(llama, SEQUENCES, None, "logps")
    likelihoods.kl_to(goal, llama, SEQUENCES, None, "kl")
    likelihoods.token_losses(llama, [*SEQUENCES, Tokens([5])], "losses")  # the empty answer is not read
    assert [(bar.desc, bar.n, bar.total, bar.leave) for bar in bars] == [
        (name, len(SEQUENCES), len(SEQUENCES), False) for name in ("goal", "logps", "kl", "losses")
    ]
    likelihoods.response_logps(llama, SEQUENCES)
    assert bars[-1].disable
