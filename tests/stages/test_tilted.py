"""Tilts by stage: KL of every token by algebra, whatever deltas are told by, against plain forward passes."""

import pytest
import torch
from conftest import random_vector
from studied import WIDTH, logps

from helpers.lm import likelihoods
from helpers.stages import tilted
from helpers.stages.divergences import divergences
from helpers.stages.tilted import tilted_divergences

ANSWERS = 8  # to held-out prompts
SHAPES = [(3, WIDTH), (3, ANSWERS, WIDTH), (3, 1, 4, WIDTH), (3, ANSWERS, 4, WIDTH), (3, ANSWERS, 40, WIDTH)]


@pytest.fixture
def given(trained):
    prompts = trained.prompts("heldout")
    assert len(prompts) == ANSWERS
    return trained.lm.role("base"), trained.lm.role("dpo"), trained.answered("dpo", prompts)


def some(shape) -> torch.Tensor:
    """Deltas, of which the first arm adds nothing."""
    return 0.5 * random_vector(*shape, seed=len(shape)) * torch.arange(3).view(3, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_by_algebra_adds_up_to_that_by_hooks(given, shape, monkeypatch):
    found = tilted_divergences(*given, some(shape))
    summed = found.groupby(["arm", "prompt"])["kl"].sum()
    assert divergences.__wrapped__(*given, some(shape))["kl"].tolist() == summed.tolist()
    monkeypatch.setattr(tilted, "has_products", lambda role: False)
    expected = divergences.__wrapped__(*given, some(shape)).set_index(["arm", "prompt"])["kl"]
    assert summed.index.equals(expected.index)
    assert summed.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    lengths = [len(tokens.response) for tokens in given[2]]
    assert found.groupby(["arm", "prompt"]).size().tolist() == lengths * 3
    assert found["token"].tolist() == [t for n in lengths * 3 for t in range(n)]


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_each_token_is_tilted_by_its_own_delta_and_those_after_the_last_by_the_last(given, plain, shape):
    found, deltas = tilted_divergences(*given, some(shape)), some(shape).double()
    W = plain["base"].get_output_embeddings().weight
    for i in (0, 5):
        tokens = given[2][i]
        at = torch.arange(len(tokens.response)).clamp(max=shape[2] - 1)
        for arm in range(3):
            p, q = logps(plain["dpo"], tokens), logps(plain["base"], tokens, deltas[arm, i % shape[1], at] @ W.T)
            kl = found[(found["arm"] == arm) & (found["prompt"] == i)]["kl"].tolist()
            assert kl == pytest.approx((p.exp() * (p - q)).sum(1).tolist(), rel=1e-4, abs=1e-5)


def test_it_is_the_same_however_many_answers_are_kept_in_memory(given, monkeypatch):
    deltas = some(SHAPES[3])
    together = tilted_divergences(*given, deltas)
    monkeypatch.setattr(likelihoods, "MAX_LOGITS", 1)
    apart = tilted_divergences(*given, deltas[:, :, [0, 1, 2, 3, 3]])  # another key, the same deltas
    assert apart["kl"].tolist() == pytest.approx(together["kl"].tolist(), rel=1e-4, abs=1e-6)


def test_deltas_of_another_number_of_prompts_are_refused(given):
    with pytest.raises(ValueError, match=r"Deltas must be \(arms, d\), \(arms, 8, d\) or \(arms, 1 or 8, tokens, d\)"):
        tilted_divergences(*given, torch.ones(2, 7, WIDTH))
