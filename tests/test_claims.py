"""The ledger: the verdict follows from the interval alone, and what is committed follows from its own numbers."""

import json
import math
from dataclasses import replace

import pytest
import torch

from helpers import artifacts, claims, spectra
from helpers.claims import CLAIMS, INFINITY, VERDICTS, Claim, verdict
from helpers.profiles import BUILT_IN

ATLAS = BUILT_IN["atlas"]
LEDGERS = sorted((artifacts.PROJECT / "figures").glob("*/claims.json"))
ENTRIES = [(path.parent.name, name) for path in LEDGERS for name in json.loads(path.read_text())]


def claim(region: tuple[float, float], no_effect: float | None) -> Claim:
    return Claim("1", "A statement.", "a number", region, no_effect, "made up")


HIGH = claim((0.8, 1.2), 0.0)  # predicted above no effect
LOW = claim((0.0, 0.1), 1.0)  # predicted below it
NEGATIVE = claim((-INFINITY, -1e-9), 0.0)
SAME = claim((-0.05, 0.05), None)  # the claim is that nothing changes


@pytest.mark.parametrize(
    "low, high, about, expected",
    [
        (0.9, 1.1, HIGH, "reproduced"),  # inside
        (0.8, 1.2, HIGH, "reproduced"),  # both ends are included
        (1.0, 1.0, HIGH, "reproduced"),
        (0.3, 0.5, HIGH, "partly"),  # disjoint, on the predicted side: too small
        (1.5, 1.9, HIGH, "partly"),  # too large
        (0.7, 0.9, HIGH, "partly"),  # half in
        (0.1, 1.5, HIGH, "partly"),  # wider than the region, no effect excluded
        (-0.5, -0.1, HIGH, "not reproduced"),  # the wrong side
        (-0.1, 0.5, HIGH, "not reproduced"),  # no effect not excluded, the region is
        (0.0, 0.5, HIGH, "not reproduced"),  # no effect is an end
        (-0.1, 0.9, HIGH, "cannot tell"),  # covers both
        (-3.0, 3.0, HIGH, "cannot tell"),
        (0.0, 0.8, HIGH, "cannot tell"),  # both are ends
        (0.02, 0.1, LOW, "reproduced"),
        (0.0, 0.0, LOW, "reproduced"),
        (0.2, 0.4, LOW, "partly"),
        (0.05, 0.3, LOW, "partly"),
        (1.1, 1.3, LOW, "not reproduced"),
        (0.5, 1.0, LOW, "not reproduced"),
        (0.1, 1.0, LOW, "cannot tell"),
        (-2.0, -0.5, NEGATIVE, "reproduced"),
        (-1e-12, -1e-13, NEGATIVE, "partly"),  # below zero, but by less than is asked
        (0.1, 0.2, NEGATIVE, "not reproduced"),
        (0.0, 0.2, NEGATIVE, "not reproduced"),
        (-0.1, 0.1, NEGATIVE, "cannot tell"),
        (-0.04, 0.05, SAME, "reproduced"),
        (-0.06, 0.01, SAME, "cannot tell"),
        (0.05, 0.2, SAME, "cannot tell"),
        (-0.3, 0.3, SAME, "cannot tell"),
        (-0.3, -0.1, SAME, "not reproduced"),
        (0.051, 0.2, SAME, "not reproduced"),
    ],
)
def test_the_verdict_follows_from_the_interval(low, high, about, expected):
    assert verdict(low, high, about.region, about.no_effect) == expected and expected in VERDICTS


NULLS = {"C8": 0.95, "C10": 0.015}  # what random displacements give


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_can_hold_and_can_fail(name):
    about = CLAIMS[name]
    low, high = about.region
    assert low < high and not (math.isinf(low) and math.isinf(high))
    assert all((about.section, about.statement, about.metric, about.origin))
    no_effect = NULLS.get(name, about.no_effect)
    inside = [end for end in about.region if math.isfinite(end)]
    assert verdict(inside[0], inside[-1], about.region, no_effect) == "reproduced"
    if no_effect is None:
        assert low <= 0 < high  # no change, no error
        assert verdict(high + 1, high + 2, about.region, None) == "not reproduced"
        assert verdict(1.01 * high, 1.01 * high, about.region, None) == "not reproduced"
    else:
        assert not low <= no_effect <= high
        assert verdict(no_effect, no_effect, about.region, no_effect) == "not reproduced"
        assert verdict(-1e9, 1e9, about.region, no_effect) == "cannot tell"


@pytest.mark.parametrize("name", NULLS)
def test_a_random_matrix_does_not_reproduce_what_is_said_of_spectra(figures_folder, name):
    """Every matrix has sigma2 < sigma1: only against a measured null can such a claim fail."""
    null, drawn = (spectra.spectrum(spectra.random_displacements(torch.ones(240), 128, seed)) for seed in (0, 1))
    of = (lambda x: x.ratio) if name == "C8" else (lambda x: x.mass(1)[0].item())
    entry = record(name, (of(drawn), of(drawn) - 0.02, of(drawn) + 0.02), null=of(null))
    assert entry["verdict"] == "not reproduced" and entry["no_effect"] == pytest.approx(of(null), rel=1e-5)


@pytest.mark.parametrize("name, null", [("C8", None), ("C10", None), ("C5", 0.3)])
def test_a_null_is_given_where_the_claim_asks_for_one_and_nowhere_else(figures_folder, name, null):
    with pytest.raises(ValueError, match=f"{name}: give a measured null where"):
        record(name, null=null)


@pytest.fixture
def figures_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTEER_FIGURES", str(tmp_path))
    return tmp_path


def record(claim_id="C5", interval=(0.95, 0.9, 0.97), profile=ATLAS, **changes):
    return claims.record(profile, claim_id, interval, **{"n": 7, "notebook": "03_x", "figure": "fig3", **changes})


def test_what_is_recorded_is_what_was_measured(figures_folder):
    entry = record(controls={"random": 1 / 3}, profile=replace(ATLAS, seed=5))
    about = CLAIMS["C5"]
    assert (entry["value"], entry["ci_low"], entry["ci_high"], entry["n"]) == (0.95, 0.9, 0.97, 7)
    assert (entry["statement"], entry["prediction"]) == (about.statement, list(about.region))
    assert (entry["seeds"], entry["controls"]) == ([5], {"random": 0.333333})
    assert (entry["verdict"], entry["notebook"], entry["figure"]) == ("reproduced", "03_x", "fig3")
    assert json.loads((figures_folder / "atlas" / "claims.json").read_text()) == {"C5": entry}
    assert claims.load(ATLAS) == {"C5": entry}


def test_claims_keep_the_papers_order_and_a_later_measurement_replaces_an_earlier_one(figures_folder):
    assert claims.load(ATLAS) == {}
    for name in ("C12", "C2", "C9"):
        record(name, (-1.0, -2.0, -0.5))
    latest = record("C12", (0.7, 0.6, 0.8))
    ledger = claims.load(ATLAS)
    assert list(ledger) == ["C2", "C9", "C12"] and ledger["C12"] == latest
    assert ledger["C9"]["prediction"][0] is None  # infinity, which JSON has no word for
    path = figures_folder / "atlas" / "claims.json"
    written = path.read_bytes()
    record("C12", (0.7, 0.6, 0.8))
    assert path.read_bytes() == written


def test_entries_of_another_study_in_the_same_folder_are_dropped(figures_folder):
    """MODEL= and DATA= keep the profile's name, and a claim that they cannot test must not keep its old verdict."""
    record("C12")
    record("C5", profile=replace(ATLAS, data="atlas:belief"))
    assert list(claims.load(ATLAS)) == ["C5"]


def test_each_profile_has_its_own_ledger(figures_folder):
    record()
    assert claims.load(BUILT_IN["tinystories"]) == {}


@pytest.mark.parametrize(
    "interval",
    [(math.nan, 0, 1), (0.5, math.nan, 1), (0.5, 0, math.inf), (-math.inf, -math.inf, 0), (2, 0, 1), (0.5, 1, 0)],
)
def test_what_is_no_measurement_is_refused_and_not_written(figures_folder, interval):
    with pytest.raises(ValueError, match=r"C5: .* is not a finite value within its interval"):
        record(interval=interval)
    assert not (figures_folder / "atlas" / "claims.json").exists()


def test_the_ledger_of_the_default_profile_is_committed():
    assert (artifacts.PROJECT / "figures" / "atlas" / "claims.json").exists()


@pytest.mark.parametrize("profile, name", ENTRIES)
def test_a_committed_verdict_follows_from_the_numbers_beside_it(profile, name):
    folder = artifacts.PROJECT / "figures" / profile
    entry, about = json.loads((folder / "claims.json").read_text())[name], CLAIMS[name]
    assert entry["verdict"] == verdict(entry["ci_low"], entry["ci_high"], about.region, entry["no_effect"])
    assert name in NULLS or entry["no_effect"] == about.no_effect
    assert entry["ci_low"] <= entry["value"] <= entry["ci_high"] and entry["n"] > 0
    assert entry["prediction"] == [None if math.isinf(end) else end for end in about.region]
    assert (entry["id"], entry["statement"], entry["metric"]) == (name, about.statement, about.metric)
    assert (folder / f"{entry['figure']}.png").is_file() and (folder / f"{entry['figure']}.json").is_file()
    assert (artifacts.PROJECT / "notebooks" / f"{entry['notebook']}.ipynb").is_file()
