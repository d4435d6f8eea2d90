"""Partners along their run: what is read off at equal strength, and what labels decide."""

import numpy as np
import pandas as pd
import pytest
import torch
from studied import PROFILE, RECIPE

from helpers import spectra
from helpers.experiments import strength
from helpers.experiments.strength import Checkpoint, at, curve, label_parts, matched
from helpers.stages import artifacts


@pytest.fixture(scope="module")
def checkpoint(trained):
    return Checkpoint(trained.profile)


def test_a_number_at_a_strength_is_interpolated_over_its_logarithm_and_none_beyond_the_run():
    found = pd.DataFrame({"strength": [10.0, 0.1, 1.0], "cosine": [0.4, 1.0, 0.8]})
    assert at(found, 1.0)["cosine"] == 0.8 and at(found, np.sqrt(10))["cosine"] == pytest.approx(0.6)
    assert at(found, np.sqrt(0.1))["strength"] == np.sqrt(0.1)
    assert at(found, 10.0)["cosine"] == 0.4
    assert at(found, 10.1).isna().all() and at(found, 0.09).isna().all()


def test_runs_are_matched_at_the_largest_strength_that_both_reach_or_not_at_all():
    strong = pd.DataFrame({"strength": [1.0, 4.0], "cosine": [0.9, 0.5]})
    weak = pd.DataFrame({"strength": [0.5, 2.0], "cosine": [1.0, 0.8]})
    one, other = matched(strong, weak, 3.0)
    assert (one["strength"], other["strength"]) == (2, 2) and (one["cosine"], other["cosine"]) == pytest.approx(
        (0.7, 0.8)
    )
    assert matched(strong, weak, 1.0)[0]["cosine"] == 0.9
    for one, other in ((strong, weak / 10), (weak / 10, strong)):
        assert all(found.isna().all() for found in matched(one, other, 3.0))


def test_the_parts_of_labels_on_a_linear_model():
    """One gradient step of DPO moves v by sigma(0) (e_w - e_l), true and reversed labels by opposite signs of it;
    a shift that labels have no part in, both alike."""
    of_labels, of_neither = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 3.0, 1.0])
    v = torch.zeros(3, requires_grad=True)
    moved = []
    for sign in (1, -1):  # the loss -log sigma(sign <v, e_w - e_l>) - <v, shift> at v = 0
        loss = -torch.nn.functional.logsigmoid(sign * v @ of_labels) - v @ of_neither
        moved.append(-torch.autograd.grad(loss, v)[0])
    pref, blind = label_parts(*moved)
    torch.testing.assert_close(pref, of_labels / 2)  # sigma(0) = 1/2
    torch.testing.assert_close(blind, of_neither)
    torch.testing.assert_close(pref + blind, moved[0])


def test_the_share_inside_directions_is_that_of_squared_norms():
    delta = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 5.0]])
    assert strength.inside(delta, torch.eye(3, dtype=torch.float64)[:2]) == pytest.approx(9 / 50)
    assert strength.held_by(torch.diag(torch.tensor([10.0, 3.0, 1.0]))) == 2  # 100 and 109 of 110


def test_a_checkpoint_is_trained_on_all_pairs_and_measured_on_some(checkpoint, trained):
    assert [len(pairs) for pairs in checkpoint.pairs.values()] == [6, 2, 4]
    assert checkpoint.pairs["heldout"] == trained.pairs["heldout"][::2]
    with artifacts.nothing_made():
        assert checkpoint.chosen.adapter == trained.chosen.adapter
    torch.testing.assert_close(
        checkpoint.displacements("heldout"), trained.displacements("heldout")[::2], atol=1e-5, rtol=1e-4
    )


def test_a_run_s_numbers_are_those_of_its_partners_by_hand(checkpoint):
    run = [one for one in strength.run(PROFILE, RECIPE) if one.recipe.stop in (0.0, 1.0)]
    found = curve(run)
    assert list(found.index) == [0.0, 1.0] and found.loc[0.0, "cosine to the first step"] == pytest.approx(1)
    first, last = run[0].direction(), checkpoint.direction()
    expected = torch.nn.functional.cosine_similarity(first, last, dim=0).item()
    assert found.loc[1.0, "cosine to the first step"] == pytest.approx(expected, abs=1e-5)
    kl = checkpoint.divergences("base", torch.stack([0 * last, last])).groupby("arm")["kl"].mean()
    assert found.loc[1.0, "strength"] == pytest.approx(kl[0]) and 0 < found.loc[0.0, "strength"] < kl[0]
    assert found.loc[1.0, "KL removed"] == pytest.approx(1 - kl[1] / kl[0])
    delta = checkpoint.displacements("heldout").double()
    assert found.loc[1.0, "explained"] == pytest.approx(
        1 - ((delta - last) ** 2).sum().item() / (delta**2).sum().item()
    )
    assert found.loc[1.0, "σ2/σ1"] == pytest.approx(spectra.spectrum(delta).ratio)
    lead = checkpoint.lead("dpo") - checkpoint.lead("base")
    assert found.loc[1.0, "lead"] == pytest.approx(lead.mean())


@pytest.mark.parametrize("left, dose", [([0.8, 0.6, 0.4, 0.2, 0.0, -0.2, 0, 0], 1.5), ([0.5] * 8, None)])
def test_the_dose_at_which_dpo_meets_the_base_is_read_between_those_tried(checkpoint, monkeypatch, left, dose):
    monkeypatch.setattr(Checkpoint, "by_arm", lambda self, role, deltas: left)
    monkeypatch.setattr(Checkpoint, "share", lambda self, role, x: 1 - x)
    found = checkpoint.meeting_dose()
    assert found == dose if dose else np.isnan(found)
    monkeypatch.setattr(Checkpoint, "by_arm", lambda self, role, deltas: [0.6, -0.2, *[0] * 6])
    assert checkpoint.meeting_dose() == pytest.approx(0.5 + 0.25 * 0.6 / 0.8)


def test_what_is_measured_of_the_studied_partner_alone(checkpoint):
    found = checkpoint.controls
    assert found["greedy, base"] == checkpoint.greedy("base")["preferred"].mean()
    late = checkpoint.displacements("heldout", "resid[2]")
    assert found["σ1 share, last block"] == pytest.approx(spectra.spectrum(late).mass(1)[0].item())
    assert found["σ1 share, last block, random"] < found["σ1 share, last block"]
    k = strength.held_by(checkpoint.token_vectors())
    assert found["inside V, random"] == pytest.approx(k / len(checkpoint.direction()), abs=0.15)
    assert found["σ2/σ1, random"] > checkpoint.numbers["σ2/σ1"]
