"""One vector trained in place of an adapter: its loss is the recipe's, and nothing but the vector moves."""

import copy
import math

import pytest
import torch
from conftest import WIDTH, hook_count, random_ids, random_vector, tiny

from helpers import gradients
from helpers.lm import bipo, likelihoods, steering, training
from helpers.lm.batches import Tokens
from helpers.lm.recipe import Recipe

RECIPE = Recipe(beta=0.5, epochs=5, batch_size=4, nll_weight=2.0)
SFT = RECIPE.replace(objective="sft")
LENGTHS = [
    (3, 2, 5),
    (7, 4, 1),
    (2, 6, 3),
    (5, 1, 2),
    (9, 3, 3),
    (4, 2, 7),
    (6, 5, 4),
]  # of a prompt, and of two answers
PROMPTS = [random_ids(n, 100 + i) for i, (n, _, _) in enumerate(LENGTHS)]
CHOSEN = [Tokens(p, random_ids(n, 200 + i)) for i, (p, (_, n, _)) in enumerate(zip(PROMPTS, LENGTHS))]
REJECTED = [Tokens(p, random_ids(n, 300 + i)) for i, (p, (_, _, n)) in enumerate(zip(PROMPTS, LENGTHS))]
V = 0.3 * random_vector(WIDTH).double()
SITES = ["resid[0]", "resid[2]", "final"]


@pytest.fixture(scope="module")
def double():
    """In float64 throughout, which a Llama is not: transformers computes its norms in float32."""
    return copy.deepcopy(tiny("gpt2")).double()


def loss(model, v, site="resid[1]", recipe=RECIPE):
    pairs = training.training_pairs(model, CHOSEN, REJECTED)
    return bipo._loss(model, pairs, site, v, recipe, (len(pairs), bipo._chosen_tokens(pairs)))


def trained(model, site="resid[1]", recipe=RECIPE, seed=0):
    pairs = training.training_pairs(model, CHOSEN, REJECTED)
    return bipo.optimised_vector(model, pairs, site, recipe, scale=1.0, seed=seed)


@torch.no_grad()
def logps(model, sequences, site, v):
    """A sequence at a time, without padding, steered from its prompt's last token on."""
    found = []
    for sequence in sequences:
        with steering.added(model, site, v, start=len(sequence.prompt) - 1):
            found.append(likelihoods.response_logps(model, [sequence])[0])
    return torch.tensor(found)


@pytest.mark.parametrize("site", SITES)
def test_the_loss_is_dpo_s_with_base_plus_v_for_a_policy_and_the_base_for_a_reference(double, site):
    policy, reference = ([logps(double, s, site, v) for s in (CHOSEN, REJECTED)] for v in (V, 0 * V))
    nll = -policy[0].sum() / sum(len(s.response) for s in CHOSEN)
    expected = gradients.dpo_loss(*policy, *reference, 0.5) + 2 * nll
    assert loss(double, V, site).item() == pytest.approx(expected.item(), rel=1e-9)
    assert loss(double, V, site, SFT).item() == pytest.approx(nll.item(), rel=1e-9)


def test_without_a_vector_the_sigmoid_term_is_log_2(double):
    assert loss(double, 0 * V, recipe=RECIPE.replace(nll_weight=0.0)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("recipe", [RECIPE, SFT], ids=["dpo", "sft"])
def test_the_gradient_is_that_of_finite_differences(double, site, recipe):
    v = V.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(double, v, site, recipe), v)
    for i in (0, 7, 31):
        step = 1e-5 * torch.eye(WIDTH, dtype=torch.float64)[i]
        slope = (loss(double, V + step, site, recipe) - loss(double, V - step, site, recipe)) / 2e-5
        assert gradient[i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("recipe", [RECIPE, SFT], ids=["dpo", "sft"])
def test_the_trained_vector_lowers_the_loss_that_it_was_trained_by(llama, site, recipe):
    v = trained(llama, site, recipe.replace(epochs=12))
    assert v.shape == (WIDTH,) and not v.requires_grad
    before, after = (loss(llama, x, site, recipe).item() for x in (0 * v, v))
    assert after < 0.9 * before


def test_training_leaves_the_model_as_it_was():
    model = copy.deepcopy(tiny("llama"))
    before, hooks = copy.deepcopy(model.state_dict()), hook_count(model)
    trained(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert hook_count(model) == hooks and not model.training


def test_training_again_gives_the_same_vector_and_another_seed_another(llama):
    first = trained(llama)
    torch.rand(3)
    assert torch.equal(trained(llama), first)
    assert not torch.equal(trained(llama, seed=1), first)


def test_every_pair_is_read_once_an_epoch_with_its_own_rejected_answer(llama, monkeypatch):
    batches = []

    def noted(model, pairs, site, v, *_):
        batches.append([(CHOSEN.index(pair.chosen), REJECTED.index(pair.rejected)) for pair in pairs])
        return v.square().sum()

    monkeypatch.setattr(bipo, "_loss", noted)
    trained(llama)
    read = [pair for batch in batches for pair in batch]
    assert all(c == r for c, r in read) and max(map(len, batches)) == RECIPE.batch_size
    epochs = [sorted(c for c, _ in read[i : i + 7]) for i in range(0, 35, 7)]
    assert len(read) == 35 and epochs == [list(range(7))] * 5
    assert read[:7] != read[7:14]


def test_steps_are_a_tenth_of_the_scale(llama, monkeypatch):
    """Adam's first step is as long as its learning rate in every coordinate."""
    monkeypatch.setattr(bipo, "_loss", lambda model, pairs, site, v, *_: v.sum())
    once, pairs = RECIPE.replace(epochs=1, batch_size=7), training.training_pairs(llama, CHOSEN, REJECTED)
    for scale in (1.0, 20.0):
        v = bipo.optimised_vector(llama, pairs, "final", once, scale, seed=0)
        torch.testing.assert_close(v, torch.full((WIDTH,), -scale / 10), atol=5e-3 * scale, rtol=0)


def test_out_of_memory_a_batch_is_computed_by_parts_and_its_gradient_is_the_same(double, monkeypatch):
    v, whole, tried = V.clone().requires_grad_(True), bipo._loss, []
    (expected,) = torch.autograd.grad(loss(double, v), v)

    def short_of_memory(model, pairs, *args):
        tried.append(len(pairs))
        if len(pairs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(model, pairs, *args)

    monkeypatch.setattr(bipo, "_loss", short_of_memory)
    found = bipo._gradient(double, training.training_pairs(double, CHOSEN, REJECTED), "resid[1]", v, RECIPE)
    assert tried == [7, 3, 3, 1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
