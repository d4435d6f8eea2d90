"""Answers under several arms: an arm that adds nothing is not decoded again."""

from contextlib import nullcontext

import pytest
import torch

from helpers.lm import decoding
from helpers.stages.roles import Role
from helpers.stages.sampled import under_arms

pytestmark = pytest.mark.usefixtures("cache")
ROLE = Role("base", "some weights", nullcontext, lambda: None)
PROMPTS = [[5], [6, 7]]
V = torch.full((4,), 0.5)


@pytest.fixture
def decoded(monkeypatch):
    """The deltas of each call of `decoding.sample`, which answers by what an arm adds."""
    calls = []

    def sample(model, tokenizer, prompts, new_tokens, seed, site, deltas, span, progress, draws, temperature):
        calls.append(deltas)
        arms = [0] if deltas is None else [int(2 * delta.sum()) for delta in deltas]
        return [[[arm, len(prompt), draw % 2] for prompt in prompts] for arm in arms for draw in range(draws)]

    monkeypatch.setattr(decoding, "sample", sample)
    return calls


def answers(deltas, new_tokens, draws=3):
    """[arm][draw][prompt] -> token ids."""
    found = under_arms(ROLE, PROMPTS, new_tokens, 0, draws, "final", deltas, "response")
    assert [found.first(arm) for arm in range(len(deltas))] == [
        [found.distinct[i] for i in arm[0]] for arm in found.said
    ]
    return [[[found.distinct[i] for i in prompts] for prompts in arm] for arm in found.said]


def said(arm, draws=3):
    return [[[arm, 1, draw % 2], [arm, 2, draw % 2]] for draw in range(draws)]


def test_arms_that_add_nothing_are_the_unsteered_answers(decoded):
    assert answers(torch.stack([0 * V, V, 0 * V, -V]), 8) == [said(0), said(4), said(0), said(-4)]
    assert len(decoded) == 2 and decoded[0] is None and torch.equal(decoded[1], torch.stack([V, -V]))
    assert answers(torch.zeros(2, 4), 8) == [said(0), said(0)] and len(decoded) == 2


def test_what_is_said_more_than_once_is_kept_once(decoded):
    found = under_arms(ROLE, PROMPTS, 7, 0, 5, "final", V[None], "response")
    assert len(found.distinct) == 4 and len(found.said[0]) == 5


def test_where_every_arm_adds_something_the_unsteered_answers_are_not_asked_for(decoded):
    own = torch.stack([0 * V, V])[None]  # one arm, a delta a prompt
    assert len(answers(own, 9)) == 1 and len(decoded) == 1 and torch.equal(decoded[0], own)
