"""Linear shifts at `final`: the nearest one where another method knows it, in closed form or by another optimiser."""

import numpy as np
import pytest
import torch
from conftest import random_vector
from scipy.optimize import minimize
from sklearn.linear_model import LinearRegression, Ridge

from helpers.lm import linear_shifts, tilts
from helpers.lm.linear_shifts import LinearShift

close = torch.testing.assert_close
VOCABULARY, D, N, P = 30, 6, 520, 4  # more contexts than are computed at a time
NONE = torch.zeros(N, 0).double()  # no features


def drawn(*shape, seed):
    return random_vector(*shape, seed=seed).double()


@pytest.fixture(scope="module")
def base():
    """An unembedding and a base's states, in float64."""
    return drawn(VOCABULARY, D, seed=1), drawn(N, D, seed=2)


@pytest.fixture(scope="module")
def goal(base):
    """Logits that no shift explains."""
    W, h = base
    return h @ W.T + drawn(N, VOCABULARY, seed=3)


@pytest.fixture(scope="module")
def x():
    """Features of several sizes, none about zero."""
    return drawn(N, P, seed=4) * torch.tensor([0.5, 1.0, 2.0, 3.0]) + 1.5


def loss_to(base, goal):
    return linear_shifts.kl_loss(*base, goal.softmax(-1) @ base[0])


def kl(goal, found):
    """By torch's own divergence: (N,)."""
    p, q = goal.log_softmax(-1), found.log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def shifted(base, z):
    return (base[1] + z) @ base[0].T


# --- The loss ---


def test_the_loss_is_the_kl_of_softmaxes_less_that_of_no_shift_and_its_gradient_is_torchs(base, goal):
    z = drawn(N, D, seed=5).requires_grad_()
    expected = kl(goal, shifted(base, z)).mean() - kl(goal, shifted(base, 0)).mean()
    expected.backward()
    value, gradient = loss_to(base, goal)(z.detach())
    assert value == pytest.approx(expected.item(), rel=1e-12)
    close(gradient, N * z.grad)


def test_no_shift_has_no_loss_and_a_loss_may_be_asked_of_other_contexts_in_float32(base, goal):
    few = base[0].float(), base[1][:7].float()
    loss, z = loss_to(few, goal[:7].float()), drawn(7, D, seed=6).float()
    assert loss(0 * z)[0] == pytest.approx(0, abs=1e-6)
    expected = (kl(goal[:7], shifted(few, z).double()) - kl(goal[:7], shifted(few, 0 * z).double())).mean()
    assert loss(z)[0] == pytest.approx(expected.item(), rel=1e-5)


# --- The nearest, without limits ---


def newton(base, goal) -> torch.Tensor:
    """The nearest constant vector by Newton's method in a trust region, with the exact Hessian."""
    W, h = (part.numpy() for part in base)
    p = goal.softmax(-1).numpy()

    def softmax(v):
        logits = (h + v) @ W.T
        q = np.exp(logits - logits.max(1, keepdims=True))
        return q / q.sum(1, keepdims=True)

    def hessian(v):
        q = softmax(v)
        return W.T @ (np.diag(q.mean(0)) - q.T @ q / N) @ W

    found = minimize(
        lambda v: -(p * np.log(softmax(v))).sum(1).mean(), np.zeros(D), jac=lambda v: (softmax(v) - p).mean(0) @ W,
        hess=hessian, method="trust-exact", options={"gtol": 1e-11},
    )  # fmt: skip
    return torch.from_numpy(found.x)


def test_of_no_features_it_is_the_vector_that_two_other_optimisers_find(base, goal):
    found = linear_shifts.nearest(loss_to(base, goal), NONE, D, steps=1000)
    assert found.M.shape == (D, 0)
    close(found.b, newton(base, goal), atol=1e-5, rtol=1e-5)
    by_tilts = tilts.nearest_vector(base[0], (base[1] @ base[0].T).log_softmax(-1), goal.log_softmax(-1))
    close(found.b, by_tilts.double(), atol=1e-5, rtol=1e-5)
    close(found(NONE), found.b.expand(N, -1))


def test_of_one_feature_a_token_it_is_the_nearest_vector_of_each_token_alone(base, goal):
    token = torch.arange(N) % 3
    x = torch.nn.functional.one_hot(token).double()
    found = linear_shifts.nearest(loss_to(base, goal), x, D, steps=1000)
    logps = (base[1] @ base[0].T).log_softmax(-1)
    for t, z in enumerate(found(torch.eye(3))):
        alone = tilts.nearest_vector(base[0], logps[token == t], goal[token == t].log_softmax(-1))
        close(z, alone.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank, r", [(None, P), (None, 2), (2, 2), (3, 2)])
def test_a_goal_that_is_the_base_plus_a_linear_shift_is_found(base, x, rank, r):
    """The map has rank r; as a product of `rank` factors it is found from the one at full rank."""
    b, M = drawn(D, seed=7), drawn(D, r, seed=8) @ drawn(r, P, seed=9) / 3
    z = b + x @ M.T
    found = linear_shifts.nearest(loss_to(base, shifted(base, z)), x, D, rank=rank, steps=2000)
    close(found(x), z, atol=1e-5, rtol=1e-5)
    assert (
        kl(shifted(base, z), shifted(base, found(x))).mean() < 1e-10 < 1 < kl(shifted(base, z), shifted(base, 0)).mean()
    )
    assert torch.linalg.matrix_rank(found.M, rtol=1e-4) == r


def test_a_shift_of_less_rank_is_one_of_that_rank_and_leaves_more(base, goal, x):
    loss = loss_to(base, goal)
    full, found = linear_shifts.nearest(loss, x, D), {}
    for rank in (1, 2, 3):
        found[rank] = linear_shifts.nearest(loss, x, D, rank=rank, start=full)
        assert torch.linalg.matrix_rank(found[rank].M, rtol=1e-10) == rank
    left = [loss(shift(x))[0] for shift in (*found.values(), full)]
    assert left == sorted(left, reverse=True) and left[-1] < left[0] < 0
    close(
        linear_shifts.nearest(loss, x, D, rank=2).M, found[2].M, atol=1e-4, rtol=1e-4
    )  # the start is found where not given


def test_what_a_product_was_started_from_is_left_behind(base, goal, x):
    """From a bad start it comes where it comes from a good one: to the same shift, and not past its rank."""
    loss = loss_to(base, goal)
    other = LinearShift(drawn(D, seed=10), drawn(D, P, seed=11), x.mean(0), 1.0)
    ways = [linear_shifts.nearest(loss, x, D, rank=2, start=start, steps=2000) for start in (None, other)]
    close(ways[0](x), ways[1](x), atol=1e-4, rtol=1e-4)


def test_in_float32_it_removes_as_much(base, goal, x):
    loss = loss_to(base, goal)
    single = loss_to((base[0].float(), base[1].float()), goal.float())
    found = linear_shifts.nearest(single, x.float(), D)
    assert found.b.dtype == found.M.dtype == torch.float32
    best = loss(linear_shifts.nearest(loss, x, D)(x))[0]
    assert best <= loss(found(x).double())[0] < best * (1 - 1e-4)  # both are below zero


# --- Where the loss is squares ---


@pytest.fixture(scope="module")
def wanted(x):
    """A linear map of the features and noise, (N, D)."""
    return x @ drawn(P, D, seed=12) + 2 * drawn(N, D, seed=13) - 1


def squares(wanted):
    return lambda z: (0.5 * (z - wanted).square().sum().item() / len(z), z - wanted)


@pytest.mark.parametrize("penalty", [0.0, 0.01, 1.0])
def test_it_is_ridge_regression_on_features_of_one_scale(x, wanted, penalty):
    """Its penalty is on half the mean of squares, scikit-learn's on their sum: 2 N times as large."""
    found = linear_shifts.nearest(squares(wanted), x, D, penalty, steps=2000)
    scaled = (x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()
    ridge = Ridge(2 * N * penalty).fit(scaled.numpy(), wanted.numpy())
    close(found(x), torch.from_numpy(ridge.predict(scaled.numpy())), atol=1e-5, rtol=1e-5)
    close(found.M, torch.from_numpy(ridge.coef_), atol=1e-5, rtol=1e-5)


def reduced_rank(x, wanted, rank) -> torch.Tensor:
    """In closed form: the least-squares fit projected on its leading right singular vectors."""
    fit = torch.from_numpy(LinearRegression().fit(x.numpy(), wanted.numpy()).predict(x.numpy()))
    centred = fit - fit.mean(0)
    V = torch.linalg.svd(centred, full_matrices=False).Vh[:rank]
    return fit.mean(0) + centred @ V.T @ V


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("start", ["its own", "another"])
def test_at_a_rank_and_without_a_penalty_it_is_reduced_rank_regression(x, wanted, rank, start):
    given = None if start == "its own" else LinearShift(drawn(D, seed=14), drawn(D, P, seed=15), x.mean(0), 1.0)
    found = linear_shifts.nearest(squares(wanted), x, D, rank=rank, start=given, steps=2000)
    close(found(x), reduced_rank(x, wanted, rank), atol=1e-5, rtol=1e-5)


def test_the_search_at_a_rank_starts_from_what_is_best_for_squares(x, wanted):
    """Without a step: a part of what the full map makes of the features, not of the map."""
    full = linear_shifts.nearest(squares(wanted), x, D, steps=2000)
    found = linear_shifts.nearest(squares(wanted), x, D, rank=2, start=full, steps=0)
    close(found(x), reduced_rank(x, wanted, 2), atol=1e-5, rtol=1e-5)


def test_the_penalty_at_a_rank_is_on_the_product(x, wanted):
    """So that the sum of both is no larger anywhere about it."""
    loss, penalty = squares(wanted), 0.1
    found = linear_shifts.nearest(loss, x, D, penalty, rank=2, steps=2000)

    def both(M):
        z = found.b + ((x - found.mean) / found.scale) @ M.T
        return loss(z)[0] + penalty * M.square().sum().item()

    U, S, V = torch.linalg.svd(found.M)
    for seed in range(20):  # matrices of rank two near by
        near = (U[:, :2] * S[:2] + 1e-3 * drawn(D, 2, seed=seed)) @ (V[:2] + 1e-3 * drawn(2, P, seed=seed + 50))
        assert both(near) > both(found.M)
    assert both(found.M) < both(linear_shifts.nearest(loss, x, D, rank=2).M)


# --- What it is ---


def test_a_shift_is_its_formula_for_any_number_of_contexts():
    b, M = torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    shift = LinearShift(b, M, torch.tensor([1.0, 1.0, 0.0]), 2.0)
    close(shift(torch.tensor([3, 5, 4])), torch.tensor([1 + 2 + 2.0, -1 + 6.0]))
    x = random_vector(2, 5, 3)
    assert shift(x).shape == (2, 5, 2) and torch.equal(shift(x)[1, 4], shift(x[1, 4]))


def test_features_that_never_change_do_no_harm(base, goal):
    constant = linear_shifts.nearest(loss_to(base, goal), torch.ones(N, 2).double(), D, steps=1000)
    close(constant.b, newton(base, goal), atol=1e-5, rtol=1e-5)
    assert not constant.M.any() and constant.scale == 1
