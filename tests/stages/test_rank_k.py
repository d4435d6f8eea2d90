"""Rank-k deltas against projections by hand."""

import numpy as np

from helpers import spectra
from helpers.stages.rank_k import rank_k_deltas


def test_rank_k_deltas_are_by_hand_projections_on_the_singular_directions(trained):
    at = ("resid[1]", "response_mean")
    base = [trained.states(split)["base", "resid[1]", "prompt_last"] for split in ("heldin", "heldout")]
    moved = [trained.displacements(split, *at) for split in ("heldin", "heldout")]
    found = rank_k_deltas(base[0], moved[0], base[1], moved[1])
    heldin, heldout = (rows.double().numpy() for rows in moved)
    U = np.linalg.svd(heldin, full_matrices=False)[2]
    for j, k in enumerate(spectra.ranks(len(U))):
        P = U[:k].T @ U[:k]
        np.testing.assert_allclose(found["own"][j].numpy(), heldout @ P, atol=1e-5)
        np.testing.assert_allclose(found["mean"][j].numpy(), np.tile(heldin.mean(0) @ P, (8, 1)), atol=1e-5)
        fitted = found["fitted"][j].double().numpy()
        np.testing.assert_allclose(fitted, fitted @ P, atol=1e-4)
