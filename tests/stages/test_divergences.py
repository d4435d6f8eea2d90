"""KL in parts, where the distributions of all answers do not fit into memory."""

import pytest
import torch
from conftest import random_vector
from studied import WIDTH, logps

from helpers.lm import likelihoods
from helpers.stages import divergences, tilted


def test_kl_is_the_same_however_many_answers_are_kept_in_memory(trained, deltas, monkeypatch):
    role, goal = trained.lm.role("base"), trained.lm.role("dpo")
    answered = trained.encoded("heldout")[0]
    together = divergences.divergences(role, goal, answered, deltas)
    parts, kl_to = [], likelihoods.kl_to
    monkeypatch.setattr(likelihoods, "MAX_LOGITS", 1)
    monkeypatch.setattr(tilted, "has_products", lambda role: False)
    monkeypatch.setattr(likelihoods, "kl_to", lambda *given: parts.append(given[2]) or kl_to(*given))
    apart = divergences.divergences.__wrapped__(role, goal, answered, deltas)
    assert list(map(list, parts)) == [[tokens] for tokens in answered]
    assert apart["kl"].tolist() == pytest.approx(together["kl"].tolist(), abs=1e-5) and apart["kl"].max() > 0


@pytest.mark.parametrize("prompts", [1, 8])
@pytest.mark.parametrize("limit", [None, 1], ids=["at once", "an answer at a time"])
def test_every_token_may_have_a_delta_of_its_own(trained, plain, monkeypatch, prompts, limit):
    role, goal = trained.lm.role("base"), trained.lm.role("dpo")
    answered = trained.encoded("heldout")[0]
    deltas = 0.5 * random_vector(2, prompts, 3 + bool(limit), WIDTH)
    if limit:
        monkeypatch.setattr(likelihoods, "MAX_LOGITS", limit)
    found = divergences.divergences(role, goal, answered, deltas).set_index(["arm", "prompt"])["kl"]
    W = plain["base"].get_output_embeddings().weight
    for i, tokens in enumerate(answered):
        at = torch.arange(len(tokens.response)).clamp(max=deltas.shape[2] - 1)
        for arm in range(2):
            shift = deltas[arm, i % prompts, at].double() @ W.T
            p, q = logps(plain["dpo"], tokens), logps(plain["base"], tokens, shift)
            assert found[arm, i] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4, abs=1e-5)
