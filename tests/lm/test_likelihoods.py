"""Log-probabilities and divergences against loops, torch and closed cases."""

import copy
import io

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, WIDTH, random_ids, random_vector, recorded, tiny
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


@pytest.mark.parametrize("prompts", [1, len(SEQUENCES)])
def test_every_token_may_have_a_delta_of_its_own(model, prompts):
    """A sequence, an arm and a token at a time: what a token is given as the only one. The last is for all that
    follow, and of more tokens than an answer has the rest says nothing."""
    deltas = random_vector(2, prompts, 4, WIDTH)  # answers have 2, 5, 1 and 9 tokens
    found = likelihoods.response_logps(model, SEQUENCES, deltas)
    goal = likelihoods.response_distributions(tiny("llama", vocab_size=model.config.vocab_size), SEQUENCES)
    kls = likelihoods.kl_to(goal, model, SEQUENCES, deltas)
    for arm in range(2):
        for i, (prompt, response) in enumerate(SEQUENCES):
            logps = kl = 0.0
            for t, token in enumerate(response):
                one = [Tokens(prompt + response[:t], [token])]
                delta = deltas[arm, i % prompts, min(t, 3)]
                logps += likelihoods.response_logps(model, one, delta[None])[0, 0]
                kl += likelihoods.kl_to([goal[i][t : t + 1]], model, one, delta[None])[0, 0]
            assert found[arm, i] == pytest.approx(logps, rel=1e-4, abs=1e-4)
            assert kls[arm, i] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert (found[0] != found[1]).all()


def test_deltas_that_do_not_fit_the_sequences_are_refused(llama):
    for shape in ((2, 3, WIDTH), (2, 2, 4, WIDTH)):
        with pytest.raises(
            ValueError, match=r"Deltas must be \(arms, d\), \(arms, 4, d\) or \(arms, 1 or 4, tokens, d\)"
        ):
            likelihoods.response_logps(llama, SEQUENCES, torch.ones(shape))


@pytest.mark.parametrize("shape", [(4, WIDTH), (2, 4, 3, WIDTH)])
def test_arms_do_not_depend_on_how_many_logits_fit(llama, monkeypatch, shape):
    deltas = random_vector(*shape)
    together = likelihoods.response_logps(llama, SEQUENCES, deltas)
    monkeypatch.setattr(likelihoods, "MAX_LOGITS", 1)
    assert likelihoods.response_logps(llama, SEQUENCES, deltas) == pytest.approx(together, rel=1e-5)


def test_response_states_are_those_of_the_prompt_s_last_token_and_of_the_answer_s(model_type, model):
    """And what the unembedding makes of them are the distributions of the answer's tokens."""
    sequences = [*SEQUENCES, Tokens([5, 6])]
    found = likelihoods.response_states(model, sequences)
    for (prompt, response), h in zip(sequences, found, strict=True):
        with recorded(model, ARCHITECTURES[model_type][1]) as plain, torch.no_grad():
            model(torch.tensor([prompt + response]))
        assert h.shape == (1 + len(response), WIDTH) and h.dtype == torch.float32 and not h.requires_grad
        torch.testing.assert_close(h, plain["final"][0, len(prompt) - 1 :], atol=1e-4, rtol=1e-4)
    expected = likelihoods.response_distributions(model, sequences)
    for h, logps in zip(found, expected):
        torch.testing.assert_close(model.get_output_embeddings()(h[:-1]).log_softmax(-1), logps, atol=1e-4, rtol=1e-4)


def test_response_states_do_not_depend_on_batching_and_are_steered_at_final(llama, monkeypatch):
    together, v = likelihoods.response_states(llama, SEQUENCES), random_vector(WIDTH)
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)
    with steering.added(llama, "final", v):
        for alone, h in zip(likelihoods.response_states(llama, SEQUENCES), together):
            torch.testing.assert_close(alone, h + v, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        likelihoods.response_states(llama, [*SEQUENCES[:1], Tokens([], [4])])


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
