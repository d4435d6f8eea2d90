"""Vectors in the blocks by stage: those that were really added are found from a partner's answers."""

import pytest
import torch
from conftest import random_vector, recorded
from studied import WIDTH, logits

from helpers.lm import block_vectors
from helpers.stages.block_vectors import nearest_vectors
from helpers.stages.divergences import divergences
from helpers.stages.interventions import with_vectors

NOTHING = torch.zeros(1, WIDTH)
SITES = ["resid[1]", "resid[2]"]


def test_what_was_added_to_the_base_is_found(trained):
    base = trained.lm.role("base")
    made = with_vectors(
        base, {"resid[1]": 0.5 * random_vector(WIDTH, seed=1), "resid[2]": random_vector(WIDTH, seed=2)}
    )
    heldin, validation, heldout = (
        trained.answered("dpo", trained.prompts(split)) for split in ("heldin", "validation", "heldout")
    )
    found = nearest_vectors(base, made, heldin, validation, SITES)
    assert list(found) == SITES and all(v.shape == (WIDTH,) for v in found.values())
    before, after = (
        divergences(role, made, heldout, NOTHING)["kl"].mean() for role in (base, with_vectors(base, found))
    )
    assert after < 0.01 * before
    assert nearest_vectors(base, made, heldin, validation, SITES[1:]).keys() == {"resid[2]"}


def test_vectors_are_sought_in_the_size_of_the_base_s_states(trained, plain, monkeypatch):
    """At the prompts' last tokens, and the base is left as it was."""
    given, base, dpo = [], trained.lm.role("base"), trained.lm.role("dpo")
    monkeypatch.setattr(block_vectors, "nearest_vectors", lambda *args, **named: given.append(args) or {})
    answered = [trained.answered("dpo", trained.prompts(split)) for split in ("validation", "heldout")]
    nearest_vectors.__wrapped__(base, dpo, *answered, ["resid[2]"])  # what is made up here is not kept
    _, towards, others, scales = given[0]
    states = []
    for tokens in answered[0]:
        with recorded(plain["base"], "model.layers") as found:
            logits(plain["base"], tokens.prompt)
        states.append(found["resid[2]"][0, -1])
    assert scales == {"resid[2]": pytest.approx(torch.stack(states).square().mean().sqrt().item(), rel=1e-4)}
    for goal, some in ((towards, answered[0]), (others, answered[1])):
        assert list(goal.answered) == some
        expected = logits(plain["dpo"], some[1].ids)[len(some[1].prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(goal.distributions[1].double(), expected, atol=1e-4, rtol=1e-4)
