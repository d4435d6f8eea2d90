"""Spectra against numpy and closed cases."""

import numpy as np
import pytest
import torch
from conftest import random_vector

from helpers import spectra


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (2, 2), (50, 3)])
@pytest.mark.parametrize("centred", [True, False])
def test_values_directions_and_summaries_are_numpy_s(shape, centred):
    H = random_vector(*shape) + 2
    found = spectra.spectrum(H, centred)
    M = H.double().numpy()
    M = M - M.mean(0) if centred else M
    _, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    p = sigma**2 / (sigma**2).sum()
    p = p[p > 1e-25]
    np.testing.assert_allclose(found.values, sigma, atol=1e-10)
    alive = sigma > 1e-8
    np.testing.assert_allclose((found.directions.numpy() * Vt).sum(1)[alive].__abs__(), 1, atol=1e-8)
    assert found.ratio == pytest.approx(sigma[1] / sigma[0], abs=1e-10)
    assert found.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-10)
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)
    np.testing.assert_allclose(found.mass(2), sigma[:2] / sigma.sum(), atol=1e-10)
    np.testing.assert_allclose(found.values.square(), np.linalg.eigvalsh(M @ M.T)[::-1][: len(sigma)], atol=1e-9)


def test_a_rank_one_matrix():
    found = spectra.spectrum(torch.outer(random_vector(9), random_vector(5, seed=1)))
    assert found.ratio == pytest.approx(0, abs=1e-7)
    assert found.entropy == pytest.approx(0, abs=1e-10)
    assert found.effective_rank == pytest.approx(1)
    assert found.mass(1)[0] == pytest.approx(1)


@pytest.mark.parametrize("k", [2, 5, 12])
def test_an_orthogonal_matrix_has_entropy_log_k(k):
    Q = torch.linalg.qr(random_vector(k, k).double())[0]
    found = spectra.spectrum(3 * Q)
    assert found.ratio == pytest.approx(1)
    assert found.entropy == pytest.approx(np.log(k))
    assert found.effective_rank == pytest.approx(k)
    np.testing.assert_allclose(found.mass(k), np.full(k, 1 / k))


def test_shares_are_of_squares_and_mass_is_of_values():
    found = spectra.spectrum(torch.diag(torch.tensor([3.0, 1.0])))
    assert found.shares.tolist() == pytest.approx([0.9, 0.1])
    assert found.mass(2).tolist() == pytest.approx([0.75, 0.25])
    assert found.entropy == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))


def test_a_large_mean_makes_the_uncentred_matrix_near_rank_one_and_not_the_centred_one():
    H = random_vector(200, 16) + 30
    raw, centred = spectra.spectrum(H), spectra.spectrum(H, centred=True)
    assert raw.entropy < 0.1 and raw.ratio < 0.05
    assert centred.entropy > 2.6 and centred.ratio > 0.8
    assert spectra.spectrum(H - 30, centred=True).values.tolist() == pytest.approx(centred.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (0, 5)])
def test_too_few_rows_or_columns_are_refused(shape):
    with pytest.raises(ValueError, match="at least two rows and two columns"):
        spectra.spectrum(torch.ones(shape))


@pytest.mark.parametrize(
    "H, centred", [(torch.zeros(3, 4), False), (torch.ones(3, 4), True), (random_vector(1, 9).expand(7, 9), True)]
)
def test_nothing_but_zeros_is_refused(H, centred):
    with pytest.raises(ValueError, match="there is no spectrum"):
        spectra.spectrum(H, centred)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (6, 6)])
def test_shifted_entropies_are_those_of_the_shifted_matrices(shape):
    H, shifts = random_vector(*shape), random_vector(3, shape[1], seed=1)
    found = spectra.shifted_entropies(H, shifts)
    np.testing.assert_allclose(found, [spectra.spectrum(H + shift).entropy for shift in shifts], atol=1e-5)
    assert len({round(entropy, 3) for entropy in found.tolist()}) == 3


def test_the_entropy_of_a_matrix_that_a_shift_makes_rank_one_is_zero():
    shift = random_vector(5)
    found = spectra.shifted_entropies(torch.zeros(7, 5), torch.stack([shift, 2 * shift]))
    np.testing.assert_allclose(found, [0, 0], atol=1e-9)


def test_random_displacements_keep_the_norms_and_have_no_direction():
    norms = random_vector(4000).abs()
    null = spectra.random_displacements(norms, 6, seed=3)
    torch.testing.assert_close(null.norm(dim=1), norms.double())
    assert torch.equal(null, spectra.random_displacements(norms, 6, seed=3))
    assert not torch.equal(null, spectra.random_displacements(norms, 6, seed=4))
    unit = null / norms.double()[:, None]
    assert unit.mean(0).abs().max() < 4 / np.sqrt(4000 * 6)  # isotropic: mean 0, covariance I / d
    np.testing.assert_allclose(unit.T @ unit / 4000, np.eye(6) / 6, atol=0.015)


def test_random_directions_like_rows_have_their_covariance_whatever_their_mean():
    rows = random_vector(30, 4).double() * torch.tensor([1.0, 2.0, 0.5, 1.0]) + 5
    drawn = spectra.random_like(rows, 40_000, seed=1)
    covariance = np.cov(rows.numpy().T, ddof=0)
    np.testing.assert_allclose(drawn.T @ drawn / len(drawn), covariance, atol=0.05 * covariance.max())


def test_cosines_are_numpy_s():
    rows, v = random_vector(7, 5), random_vector(5, seed=1)
    R, u = rows.double().numpy(), v.double().numpy()
    expected = (R @ u) / np.linalg.norm(R, axis=1) / np.linalg.norm(u)
    np.testing.assert_allclose(spectra.cosines(rows, v), expected, atol=1e-12)
    assert spectra.cosines(torch.stack([2 * v, -v]), v).tolist() == pytest.approx([1, -1])
    assert spectra.cosines(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 3.0])).tolist() == [0]


def test_example_mass_sums_to_one_over_a_full_basis():
    H = random_vector(9, 6)
    mass = spectra.example_mass(H, torch.linalg.qr(random_vector(6, 6, seed=1).double())[0])
    assert mass.shape == (9, 6) and (mass >= 0).all()
    np.testing.assert_allclose(mass.sum(1), np.ones(9))
    one = spectra.example_mass(torch.tensor([[3.0, 4.0]]), torch.eye(2, dtype=torch.float64))
    assert one[0].tolist() == pytest.approx([9 / 25, 16 / 25])


def test_example_mass_along_a_spectrum_s_own_directions_weighs_up_to_its_shares():
    H = random_vector(30, 6)
    found = spectra.spectrum(H)
    weights = H.double().square().sum(1)
    mass = (spectra.example_mass(H, found.directions) * weights[:, None]).sum(0) / weights.sum()
    np.testing.assert_allclose(mass, found.shares)


# --- Rank-k directions ---

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
    U = spectra.directions(delta)
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
    U = spectra.directions(delta)
    return delta, held, U, spectra.coefficients(BASE, delta, HELD, held, U)


def test_own_coefficients_at_full_rank_give_the_displacement_back(found):
    _, held, U, coefficients = found
    torch.testing.assert_close(spectra.truncated(coefficients["own"], U, [D])[0], held, atol=1e-5, rtol=1e-4)


def test_mean_coefficients_are_one_vector_for_all_and_at_full_rank_the_mean(found):
    delta, _, U, coefficients = found
    for of_k in spectra.truncated(coefficients["mean"], U, [1, 2, D]):
        assert torch.equal(of_k, of_k[:1].expand(M, -1))
    torch.testing.assert_close(of_k[0], delta.double().mean(0).float(), atol=1e-5, rtol=1e-4)


def test_fitted_coefficients_find_a_linear_rule_on_prompts_not_seen(found):
    _, held, U, coefficients = found
    fitted = spectra.truncated(coefficients["fitted"], U, [1, 2])
    error = (fitted - held).square().sum((1, 2)) / held.square().sum()
    assert error[1] < 1e-3 < error[0]  # two directions hold all of it, one does not


def test_swapped_coefficients_are_the_fitted_ones_of_another_prompt(found):
    *_, coefficients = found
    assert torch.equal(coefficients["swapped"][1:], coefficients["fitted"][:-1])
    assert torch.equal(coefficients["swapped"][0], coefficients["fitted"][-1])


def test_fitted_coefficients_of_what_is_not_in_the_states_are_near_their_mean():
    noise = torch.randn(N, D)
    U = spectra.directions(noise)
    coefficients = spectra.coefficients(BASE, noise, HELD, torch.randn(M, D), U)
    assert coefficients["fitted"].var() < 0.15 * coefficients["own"].var()


def test_a_coefficient_does_not_depend_on_those_that_are_left_out(found):
    delta, held, U, coefficients = found
    fewer = spectra.coefficients(BASE, delta, HELD, held, U[:1])
    for kind in spectra.KINDS:
        torch.testing.assert_close(fewer[kind], coefficients[kind][:, :1], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "d, expected", [(128, [1, 2, 3, 4, 8, 16, 128]), (16, [1, 2, 3, 4, 8, 16]), (5, [1, 2, 3, 4, 5])]
)
def test_ranks_end_with_the_whole_space(d, expected):
    assert spectra.ranks(d) == expected


def test_matched_shifts_have_the_length_of_v_and_its_cosine_to_the_mean_and_are_random_otherwise():
    v, mean = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    found = spectra.matched_shifts(v, mean, 200, 1)
    torch.testing.assert_close(found.norm(dim=1), v.double().norm().expand(200))
    torch.testing.assert_close(spectra.cosines(found, mean), spectra.cosines(v[None], mean).expand(200))
    across = found - (found @ mean.double())[:, None] * mean.double() / mean.double().square().sum()
    assert across.mean(0).norm() < 0.15 * across.norm(dim=1).mean()  # 200 directions of no common one
