"""Rank-k steering: against projections by hand, and on displacements whose structure is known."""

import numpy as np
import pytest
import torch

from helpers import lowrank

torch.manual_seed(0)
D, N, M = 24, 300, 50
BASE, HELD = torch.randn(N, D), torch.randn(M, D)
AXES = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0].T


def moved(states, reads, strengths):
    """Displacements along the first axes, with coefficients that are linear in the base's states."""
    return sum(s * (states.double() @ read)[:, None] * axis for s, read, axis in zip(strengths, reads, AXES)).float()


READS = torch.randn(2, D, dtype=torch.float64)


def test_the_directions_are_those_of_numpy_s_svd_leading_first():
    delta = moved(BASE, READS, (3.0, 1.0)) + 0.01 * torch.randn(N, D)
    U = lowrank.directions(delta)
    expected = np.linalg.svd(delta.double().numpy(), full_matrices=False)[2]
    np.testing.assert_allclose(np.abs((U.numpy() * expected).sum(1)), 1, atol=1e-6)
    for axis in AXES[:2]:  # two directions hold what was put in
        assert (U[:2] @ axis).norm() > 0.99


@pytest.fixture(scope="module")
def found():
    delta, held = (
        moved(BASE, READS, (3.0, 1.0)) + 0.5 * AXES[0].float(),
        moved(HELD, READS, (3.0, 1.0)) + 0.5 * AXES[0].float(),
    )
    U = lowrank.directions(delta)
    return delta, held, U, lowrank.coefficients(BASE, delta, HELD, held, U)


def test_own_coefficients_at_full_rank_give_the_displacement_back(found):
    _, held, U, coefficients = found
    torch.testing.assert_close(lowrank.truncated(coefficients["own"], U, [D])[0], held, atol=1e-5, rtol=1e-4)


def test_mean_coefficients_are_one_vector_for_all_and_at_full_rank_the_mean(found):
    delta, _, U, coefficients = found
    for of_k in lowrank.truncated(coefficients["mean"], U, [1, 2, D]):
        assert torch.equal(of_k, of_k[:1].expand(M, -1))
    torch.testing.assert_close(of_k[0], delta.double().mean(0).float(), atol=1e-5, rtol=1e-4)


def test_fitted_coefficients_find_a_linear_rule_on_prompts_not_seen(found):
    _, held, U, coefficients = found
    fitted = lowrank.truncated(coefficients["fitted"], U, [1, 2])
    error = (fitted - held).square().sum((1, 2)) / held.square().sum()
    assert error[1] < 1e-3 < error[0]  # two directions hold all of it, one does not


def test_swapped_coefficients_are_the_fitted_ones_of_another_prompt(found):
    *_, coefficients = found
    assert torch.equal(coefficients["swapped"][1:], coefficients["fitted"][:-1])
    assert torch.equal(coefficients["swapped"][0], coefficients["fitted"][-1])


def test_fitted_coefficients_of_what_is_not_in_the_states_are_near_their_mean():
    noise = torch.randn(N, D)
    U = lowrank.directions(noise)
    coefficients = lowrank.coefficients(BASE, noise, HELD, torch.randn(M, D), U)
    assert coefficients["fitted"].var() < 0.15 * coefficients["own"].var()


def test_a_coefficient_does_not_depend_on_those_that_are_left_out(found):
    delta, held, U, coefficients = found
    fewer = lowrank.coefficients(BASE, delta, HELD, held, U[:1])
    for kind in lowrank.KINDS:
        torch.testing.assert_close(fewer[kind], coefficients[kind][:, :1], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "d, expected", [(128, [1, 2, 3, 4, 8, 16, 128]), (16, [1, 2, 3, 4, 8, 16]), (5, [1, 2, 3, 4, 5])]
)
def test_ranks_end_with_the_whole_space(d, expected):
    assert lowrank.ranks(d) == expected
