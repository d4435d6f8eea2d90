"""Tilted distributions by algebra: the same KL as by softmax, and the nearest vector where it is known."""

import pytest
import torch
from conftest import random_vector
from scipy.optimize import minimize

from helpers.lm import tilts

close = torch.testing.assert_close
VOCABULARY, D, N = 40, 6, 300  # more contexts than are computed at a time


@pytest.fixture
def model():
    """An unembedding and the base's and a partner's log-probabilities, in float64."""
    W = random_vector(VOCABULARY, D, seed=1).double()
    base, moved = (random_vector(N, VOCABULARY, seed=seed).double() for seed in (2, 3))
    return W, base.log_softmax(-1), (base + 0.5 * moved).log_softmax(-1)


def kl(goal, found):
    """By torch's own divergence: (N,)."""
    return torch.nn.functional.kl_div(found, goal, reduction="none", log_target=True).sum(-1)


def test_kl_of_every_arm_is_that_of_its_softmax(model):
    W, base, goal = model
    A = W @ torch.stack([torch.zeros(D), *(10.0**k * random_vector(D, seed=k + 9) for k in (-3, 0, 1))]).double().T
    tilted = [(base + a).log_softmax(-1) for a in A.T]
    close(tilts.kl_to_goal(base, goal, A), torch.stack([kl(goal, one) for one in tilted]), atol=1e-9, rtol=1e-9)
    close(tilts.kl_from_base(base, A), torch.stack([kl(one, base) for one in tilted]), atol=1e-9, rtol=1e-9)


def test_of_a_partner_that_is_the_base_plus_a_bias_it_is_the_bias(model):
    W, base, _ = model
    v = random_vector(D, seed=4).double()
    found = tilts.nearest_vector(W, base, (base + W @ v).log_softmax(-1))
    assert (found.double() - v).norm() / v.norm() < 1e-6


def test_the_loss_and_its_gradient_are_torchs(model):
    W, base, goal = model
    v = random_vector(D, seed=5).double().requires_grad_()
    expected = kl(goal, (base + W @ v).log_softmax(-1)).mean()
    expected.backward()
    value, gradient = tilts.kl_and_gradient(W, base, goal.exp().mean(0), v.detach())
    assert value + kl(goal, base).mean().item() == pytest.approx(expected.item(), rel=1e-12)
    close(gradient, v.grad)


def test_another_optimiser_finds_the_same(model):
    """Newton's method in a trust region, with the Hessian W^T (diag p - p p^T) W of every context."""
    W, base, goal = model

    def hessian(v):
        p = (base + W @ torch.from_numpy(v)).softmax(-1)
        return (W.T @ (torch.diag(p.mean(0)) - p.T @ p / N) @ W).numpy()

    def loss(v):
        return kl(goal, (base + W @ torch.from_numpy(v)).log_softmax(-1)).mean().item()

    def gradient(v):
        p = (base + W @ torch.from_numpy(v)).softmax(-1)
        return (W.T @ (p - goal.exp()).mean(0)).numpy()

    start = torch.zeros(D).double().numpy()
    other = minimize(loss, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-12})
    found = tilts.nearest_vector(W, base, goal)
    close(found.double(), torch.from_numpy(other.x), atol=1e-6, rtol=1e-6)
    assert 0 < loss(found.double().numpy()) < loss(start)


def test_in_float32_it_removes_as_much(model):
    W, base, _ = model
    v, noise = random_vector(D, seed=4).double(), random_vector(N, VOCABULARY, seed=6).double()
    goal = (base + W @ v + 0.3 * noise).log_softmax(-1)
    found = [tilts.nearest_vector(W, base, goal), tilts.nearest_vector(W.float(), base.float(), goal.float())]
    left = tilts.kl_to_goal(base, goal, (W.float() @ torch.stack(found).T).double()).mean(1)
    close(left[1], left[0], rtol=1e-5, atol=0)


def test_tokens_that_are_never_said_do_no_harm(model):
    W, base, goal = model
    base, goal = (x.masked_fill(torch.arange(VOCABULARY) == 3, -torch.inf).log_softmax(-1) for x in (base, goal))
    assert tilts.nearest_vector(W, base, goal).isfinite().all()
    assert tilts.kl_to_goal(base, goal, W).isfinite().all() and tilts.kl_from_base(base, W).isfinite().all()
