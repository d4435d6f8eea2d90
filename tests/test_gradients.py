"""The closed forms of section 2 against autograd, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WIDTH

from helpers import gradients
from helpers.gradients import Branch
from helpers.lm import architecture

SEEDS = range(5)
V, D = 17, 9


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy(seed):
    return drawn(seed, D), drawn(seed + 100, D), drawn(seed + 200, V, D)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_log_ratio_is_the_difference_of_log_probabilities(seed):
    h, _, W = toy(seed)
    logp = torch.log_softmax(W @ h, dim=0)
    close(gradients.log_ratio(h, W, 3, 8), logp[3] - logp[8])


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_single_token_gradient_is_autograd_s_and_lies_along_the_embedding_difference(seed, beta):
    h, h_ref, W = toy(seed)
    h.requires_grad_(True)
    logp, ref = torch.log_softmax(W @ h, 0), torch.log_softmax(W @ h_ref, 0)
    loss = -torch.log(torch.sigmoid(beta * ((logp[3] - ref[3]) - (logp[8] - ref[8]))))
    (expected,) = torch.autograd.grad(loss, h)
    found = gradients.single_token_gradient(h.detach(), h_ref, W, 3, 8, beta)
    close(found, expected)
    close(F.cosine_similarity(found, W[3] - W[8], dim=0), torch.tensor(-1.0, dtype=torch.float64))
    m = gradients.single_token_margin(h.detach(), h_ref, W, 3, 8, beta)
    close(-torch.log(torch.sigmoid(m)), loss.detach())


@pytest.mark.parametrize("lengths", [(1, 1), (4, 4), (3, 6)])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_completion_gradients_are_autograd_s(seed, beta, lengths):
    W, states = drawn(seed, V, D), [drawn(seed + 10 + i, n, D).requires_grad_(True) for i, n in enumerate(lengths)]
    targets = [torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed + n)) for n in lengths]
    ref = [drawn(seed + 20 + i, 1) for i in range(2)]
    logps = [-F.cross_entropy(h @ W.T, y, reduction="sum")[None] for h, y in zip(states, targets)]
    loss = -torch.log(torch.sigmoid(beta * ((logps[0] - ref[0]) - (logps[1] - ref[1])))).mean()
    close(gradients.dpo_loss(logps[0], logps[1], ref[0], ref[1], beta), loss)
    expected = torch.autograd.grad(loss, states)
    branches = [Branch(h.detach(), y) for h, y in zip(states, targets)]
    for found, answer in zip(gradients.completion_gradients(*branches, W, (ref[0] - ref[1])[0], beta), expected):
        close(found, answer)


@pytest.mark.parametrize("seed", SEEDS)
def test_for_one_token_each_from_one_state_the_expected_embedding_cancels(seed):
    h, h_ref, W = toy(seed)
    chosen, rejected = Branch(h[None], torch.tensor([3])), Branch(h[None], torch.tensor([8]))
    ref_margin = gradients.log_ratio(h_ref, W, 3, 8)
    total = sum(gradients.completion_gradients(chosen, rejected, W, ref_margin, 0.7))[0]
    close(total, gradients.single_token_gradient(h, h_ref, W, 3, 8, 0.7))


@pytest.mark.parametrize("seed", SEEDS)
def test_completion_log_probability_and_its_gradient(seed):
    h, W, targets = drawn(seed, 5, D).requires_grad_(True), drawn(seed + 1, V, D), torch.tensor([0, 4, 4, 16, 2])
    logp = gradients.completion_logp(h, W, targets)
    close(logp, torch.distributions.Categorical(logits=h @ W.T).log_prob(targets).sum())
    (expected,) = torch.autograd.grad(logp, h)
    close(W[targets] - gradients.expected_embedding(h.detach(), W), expected)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_the_loss_is_log_2_at_initialisation_and_its_mean_over_pairs(beta):
    chosen, rejected = -drawn(1, 6).abs(), -drawn(2, 6).abs()
    start = gradients.dpo_loss(chosen, rejected, chosen, rejected, beta)
    assert start.item() == pytest.approx(math.log(2), abs=1e-15)
    one_by_one = [gradients.dpo_loss(c + 1, r, c, r, beta).item() for c, r in zip(chosen, rejected)]
    assert gradients.dpo_loss(chosen + 1, rejected, chosen, rejected, beta).item() == pytest.approx(one_by_one[0])
    assert one_by_one[0] == pytest.approx(math.log(1 + math.exp(-beta)))


@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_the_loss_is_finite_far_out(margin):
    zero = torch.zeros(1, dtype=torch.float64)
    assert gradients.dpo_loss(zero + margin, zero, zero, zero, 1.0).item() == max(0.0, -margin)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_jacobians_are_autograd_s(seed, eps):
    x, gain = 3 * drawn(seed, D) + 1, drawn(seed + 1, D)
    rms = torch.autograd.functional.jacobian(lambda x: F.rms_norm(x, (D,), gain, eps), x)
    close(gradients.rms_norm_jacobian(x, gain, eps), rms)
    layer = torch.autograd.functional.jacobian(lambda x: F.layer_norm(x, (D,), gain, drawn(9, D), eps), x)
    close(gradients.layer_norm_jacobian(x, gain, eps), layer)


def test_a_model_s_own_norm_in_float64_and_its_jacobian(model):
    norm = architecture.final_norm(model)
    x = 3 * drawn(1, WIDTH) + 1
    found = gradients.apply_norm(norm, x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), norm(x.float()), atol=1e-5, rtol=1e-5)  # the model's, in its precision
    close(
        gradients.norm_jacobian(norm, x), torch.autograd.functional.jacobian(lambda x: gradients.apply_norm(norm, x), x)
    )
    together = gradients.apply_norm(norm, torch.stack([x, 2 * x]))
    close(together[0], found)


@pytest.mark.parametrize(
    "chosen, rejected, t",
    [([1, 2], [3, 2], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1), ([], [1], 0)],
)
def test_first_difference(chosen, rejected, t):
    assert gradients.first_difference(chosen, rejected) == t
    assert gradients.first_difference(rejected, chosen) == t


@pytest.mark.parametrize("same", [[], [4], [4, 5]])
def test_equal_completions_have_no_first_difference(same):
    with pytest.raises(ValueError, match="must differ somewhere"):
        gradients.first_difference(same, list(same))


def test_relative_error():
    assert gradients.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert gradients.relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_token_vectors_are_the_embedding_differences_at_the_first_difference():
    W = drawn(0, V, D)
    found = gradients.token_vectors(W, [[1, 2, 3], [4], [5, 6]], [[1, 2, 7], [9, 2], [5, 8, 1]])
    close(found, torch.stack([W[3] - W[7], W[4] - W[9], W[6] - W[8]]))


# --- The exact statement ---


def test_a_partner_that_is_the_base_and_a_bias_has_a_reward_that_is_linear_in_the_output_embedding():
    """Another constant in every context, and v found again to rounding."""
    g = torch.Generator().manual_seed(3)
    W, v = torch.randn(50, 6, generator=g, dtype=torch.float64), torch.randn(6, generator=g, dtype=torch.float64)
    base = (3 * torch.randn(20, 50, generator=g, dtype=torch.float64)).log_softmax(-1)
    partner = (base + W @ v).log_softmax(-1)
    found = gradients.linear_reward(W, base, partner)
    torch.testing.assert_close(found, v, rtol=1e-10, atol=1e-10)
    assert gradients.linear_share(W, base, partner, found) == pytest.approx(1, abs=1e-12)
    assert gradients.linear_share(W, base, partner, 0 * v) == 0


def test_least_squares_on_the_reward_are_those_of_a_weighted_regression_with_a_constant_a_context():
    """One row a context and token, weighed by the base, in numpy; a token that the base rules out weighs nothing."""
    g = torch.Generator().manual_seed(4)
    W = torch.randn(9, 3, generator=g, dtype=torch.float64)
    base, partner = (torch.randn(5, 9, generator=g, dtype=torch.float64) for _ in range(2))
    base[0, 2] = -torch.inf
    base, partner = base.log_softmax(-1), partner.log_softmax(-1)
    contexts = np.repeat(np.eye(5), 9, axis=0)
    design = np.hstack([np.tile(W.numpy(), (5, 1)), contexts])
    root = base.exp().numpy().ravel() ** 0.5
    reward = torch.where(base.isfinite(), partner - base, 0.0).numpy().ravel()
    fitted, (left,), *_ = np.linalg.lstsq(design * root[:, None], reward * root)
    _, (alone,), *_ = np.linalg.lstsq(contexts * root[:, None], reward * root)
    found = gradients.linear_reward(W, base, partner)
    assert found.tolist() == pytest.approx(fitted[:3], rel=1e-9)
    assert gradients.linear_share(W, base, partner, found) == pytest.approx(1 - left / alone, rel=1e-9)
