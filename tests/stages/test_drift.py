"""KL of a steered model from itself, against an explicit sum over the vocabulary."""

import pytest
import torch
from studied import WIDTH, logps

from helpers.lm.architecture import unembedding
from helpers.lm.batches import Tokens
from helpers.stages import drift, tilted

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def directions(trained):
    """v*, v_token and one that the base's states have no part in."""
    other = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    return torch.stack([trained.direction(), trained.token_vector().vector, other])


@pytest.fixture(params=["by algebra", "by hooks"])
def own_answers(trained, monkeypatch, request):
    """The base and its answers to validation prompts; by hooks where logits are more than W h."""
    if request.param == "by hooks":
        monkeypatch.setattr(tilted, "has_products", lambda role: False)
    return trained._own_answers


def test_drift_is_kl_of_the_steered_from_the_unsteered_summed_over_the_base_s_own_answers(trained, plain, own_answers):
    deltas = torch.stack([0.5 * torch.ones(WIDTH), torch.zeros(WIDTH)])
    found, expected = drift._drifting(*own_answers)(deltas), []
    shift = deltas[0].double() @ unembedding(plain["base"]).weight.double().T
    ids, end = trained.answers("base", "validation")["ids"], trained.lm.tokenizer.eos_token_id
    for prompt, answer in zip(trained.prompts("validation"), ids):
        whole = answer + [end] * (len(answer) < trained.profile.sizes.new_tokens)
        p, q = (logps(plain["base"], Tokens(prompt, whole), by).double() for by in (shift, 0.0))
        expected.append((p.exp() * (p - q)).sum())
    close(found[0], torch.stack(expected).mean(), atol=1e-4, rtol=1e-3)
    assert found[1].abs() < 1e-9 and found[0] > 0


def test_vectors_at_equal_kl_keep_their_direction_and_have_the_kl_of_v_star(directions, own_answers):
    made, told = drift.equally_far, drift._drifting(*own_answers)
    found, kl = made.__wrapped__(*own_answers, directions[0], 7 * directions)["vectors"], told(directions[:1])
    close(found[0], directions[0], atol=0, rtol=2e-3)
    close(torch.cosine_similarity(found, directions), torch.ones(3))
    close(told(found), kl.repeat(3), rtol=0.01, atol=0)


def test_a_direction_that_the_unembedding_does_not_hear_is_left_at_the_largest_length(trained, directions, monkeypatch):
    heard = torch.nn.CosineSimilarity()
    monkeypatch.setattr(drift, "_drifting", lambda *_: lambda vectors: (heard(vectors, directions[:1]) > 0.999).float())
    found = drift.equally_far.__wrapped__(*trained._own_answers, directions[0], directions[1:])["vectors"]
    close(found.norm(dim=1), (drift.LARGEST * directions[0].norm()).repeat(2), rtol=1e-3, atol=0)
