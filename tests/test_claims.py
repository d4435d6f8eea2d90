"""The ledger: verdicts follow from what it holds by rule, and what is committed follows from its own numbers."""

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ledgers import entry

from helpers import claims, figures, places, profiles, spectra
from helpers.claims import CLAIMS
from helpers.estimates import Estimate
from helpers.evidence.verdicts import UNSPECIFIC, side

ATLAS = profiles.load("atlas")
LEDGERS = sorted((places.PROJECT / "figures").glob("*/claims.json"))
ENTRIES = [(path.parent.name, name) for path in LEDGERS for name in json.loads(path.read_text())]


def test_verdicts_are_adjusted_for_the_number_of_claims_and_ours_are_apart():
    """p = 0.03 of one claim alone; of five with as weak an effect none is told from nothing."""
    weak = {"interval": (0.02, 0.40), "value": 0.21, "region": (0.1, 0.5), "beyond": {"SFT": [0.21, 0.02, 0.40]}}
    alone = claims.verdicts({"C3": entry(name="C3", **weak)})["C3"]
    assert alone[:3] == ("yes", "across", "yes")
    many = {name: entry(name=name, **weak) for name in ("C3", "C4", "C5", "C6", "C7")}
    assert {found[:3] for found in claims.verdicts(many).values()} == {("undecided", "across", "no")}
    ours = claims.verdicts(many | {"E1": entry(name="E1", **weak)})["E1"]
    assert ours[:3] == ("yes", "across", "yes")
    algebra = {"C1": entry((1e-12, 1e-12), (0, 1e-10), None, name="C1"), "C3": entry(name="C3", **weak)}
    assert claims.verdicts(algebra)["C3"] == alone


@pytest.mark.parametrize(
    "name, figures_of_it, why",
    [
        ("C12", {"estimate": Estimate(0.1, 0.0, 0.2)}, None),  # none by nature: nothing is claimed to change
        ("C5", {"missing": {"SFT": "none can be trained beside a ready partner"}}, "ready partner"),
        ("C6", {"null": 0.0, "missing": {"SFT": "DPO moves nothing, so that there is no share"}}, "no share"),
        ("C4", {"missing": {"SFT": "its run does not reach the partner's strength"}}, "does not reach"),
    ],
)
def test_a_control_can_be_missing_in_four_ways_and_the_row_says_which(figures_folder, name, figures_of_it, why):
    one = record(name, **figures_of_it)
    found = claims.verdicts({name: one})[name]
    assert found.specific == ("—" if why is None else "undecided") and found.decided_by == ""
    assert why is None or why in one["missing"]["SFT"]
    assert found.word != UNSPECIFIC and f"specific {found.specific}" in claims.told(one)


NULLS = {"C6": 0.1, "C7": 0.0, "C8": 0.95, "C10": 0.015, "C11": 0.3}  # what random directions or displacements give
NULLS |= {"E7": 0.4}  # what one vector of the two does


@pytest.mark.parametrize("name", claims.ALL)
def test_every_claim_can_hold_and_can_fail(name):
    about = claims.ALL[name]
    low, high = about.region
    assert low < high and not (math.isinf(low) and math.isinf(high))
    assert all((about.section, about.statement, about.metric, about.origin, about.plain))
    assert (about.no_effect == claims.MEASURED) == (name in NULLS)
    no_effect = NULLS.get(name, about.no_effect)

    def word(interval):
        one = entry(interval, about.region, no_effect, name=name)
        ahead = side(one)
        return claims.verdicts({name: one | {"beyond": {"SFT": [ahead, ahead - 0.1, ahead + 0.1, None]}}})[name].word

    inside = [end for end in about.region if math.isfinite(end)]
    assert word((inside[0], inside[-1])) in ("reproduced", "algebra")
    if no_effect is None:
        assert low <= 0 < high  # no change, no error
        assert word((high + 1, high + 2)) == word((1.01 * high, 1.01 * high)) == "not reproduced"
    else:
        assert not low <= no_effect <= high
        assert word((no_effect, no_effect)) == "not reproduced" and word((-1e9, 1e9)) == "undecided"


@pytest.mark.parametrize("name", ["C8", "C10", "C11"])
def test_a_random_matrix_does_not_reproduce_what_is_said_of_spectra(figures_folder, name):
    """Every matrix has sigma2 < sigma1 and a part in any span: only against a measured null can such claims fail."""
    null, drawn = (spectra.random_displacements(torch.ones(240), 128, seed) for seed in (0, 1))
    measured = {
        "C8": lambda x: spectra.spectrum(x).ratio,
        "C10": lambda x: spectra.spectrum(x).mass(1)[0].item(),
        "C11": lambda x: spectra.example_mass(x, torch.eye(128, dtype=x.dtype)[:40]).sum(1).mean().item(),
    }[name]
    one = record(name, Estimate(*(measured(drawn) + x for x in (0, -0.02, 0.02))), null=measured(null))
    assert claims.verdicts({name: one})[name].word == "not reproduced"
    assert one["no_effect"] == pytest.approx(measured(null), rel=1e-5)


@pytest.mark.parametrize("name, null", [*((name, None) for name in NULLS), ("C5", 0.3)])
def test_a_null_is_given_where_the_claim_asks_for_one_and_nowhere_else(figures_folder, name, null):
    with pytest.raises(ValueError, match=f"{name}: give a measured null where"):
        record(name, null=null)


@pytest.fixture
def figures_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTEER_FIGURES", str(tmp_path))
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(figures, "notebook_of", {"fig3": "03_x"}.__getitem__)
    return tmp_path


MEASURED = Estimate(0.95, 0.9, 0.97)


def record(claim_id="C5", estimate=MEASURED, profile=ATLAS, **changes):
    return claims.record(profile, claim_id, estimate, **{"n": 7, "figure": "fig3", **changes})


def test_what_is_recorded_is_what_was_measured(figures_folder):
    further = {"SFT": Estimate(0.1, 0.05, 0.15)}
    entry = record(controls={"random": 1 / 3}, profile=ATLAS.replace(seed=5), beyond=further)
    about = CLAIMS["C5"]
    assert (entry["value"], entry["ci_low"], entry["ci_high"], entry["n"]) == (0.95, 0.9, 0.97, 7)
    assert (entry["statement"], entry["prediction"]) == (about.statement, list(about.region))
    assert (entry["by_seed"], entry["controls"]) == ([0.95], {"random": 0.333333})
    assert (entry["beyond"], entry["varied"]) == ({"SFT": [0.1, 0.05, 0.15, None]}, "prompts and a training seed")
    assert (entry["notebook"], entry["figure"]) == ("03_x", "fig3")
    assert json.loads((figures_folder / "atlas" / "claims.json").read_text()) == {"C5": entry}
    assert claims.load(ATLAS) == {"C5": entry}


def test_degrees_of_freedom_are_kept_and_decide_how_much_an_interval_proves(figures_folder):
    """The same intervals, from few worlds and from many prompts: beyond 95 % a t of two has fatter tails."""
    beyond = {"SFT": Estimate(0.2, 0.05, 0.35)}
    normal = {name: record(name, Estimate(0.9, 0.8, 1.0), beyond=beyond) for name in ("C3", "C4", "C5")}
    few = {"SFT": beyond["SFT"]._replace(df=2)}
    of_few = {name: record(name, Estimate(0.9, 0.8, 1.0, df=2), beyond=few) for name in ("C3", "C4", "C5")}
    assert (of_few["C5"]["df"], of_few["C5"]["beyond"]["SFT"][3], normal["C5"]["df"]) == (2, 2, None)
    assert claims.verdicts(normal)["C5"].specific == "yes" and claims.verdicts(of_few)["C5"].specific == "no"


def test_each_seed_s_value_is_kept_and_what_was_varied_is_said(figures_folder):
    entry = record(estimate=Estimate(0.9, 0.89, 0.95, (1.0, 0.8, 2.7 / 3)))
    assert (entry["by_seed"], entry["varied"]) == ([1.0, 0.8, 0.9], "prompts and 3 training seeds")
    assert record(varied="8 worlds")["varied"] == "8 worlds"


def test_later_controls_join_those_of_a_claim_and_change_nothing_else(figures_folder):
    before = {
        name: record(name, Estimate(0.5, 0.4, 0.6), controls={"random": 0.1, "old": 2.0}) for name in ("C4", "C5")
    }
    further, why = {"SFT": Estimate(0.2, 0.1, 0.3)}, {"shuffled": "its run does not reach the strength"}
    added = claims.add_controls(ATLAS, "C5", {"random": 2 / 3, "new": -1.0}, further, why)
    after = claims.load(ATLAS)
    assert after["C5"] == added and after["C5"].pop("controls") == {"random": 0.666667, "old": 2.0, "new": -1.0}
    assert (after["C5"].pop("beyond"), after["C5"].pop("missing")) == ({"SFT": [0.2, 0.1, 0.3, None]}, why)
    for name in ("controls", "beyond", "missing"):
        before["C5"].pop(name)
    assert after == before and list(after) == ["C4", "C5"]


def test_a_control_that_comes_later_is_no_longer_missing_and_one_that_goes_is_no_longer_there(figures_folder):
    record("C5", Estimate(0.5, 0.4, 0.6))
    claims.add_controls(ATLAS, "C5", missing={"SFT": "too few seeds"})
    there = claims.add_controls(ATLAS, "C5", {"SFT at equal strength": 0.9}, {"SFT": Estimate(0.2, 0.1, 0.3)})
    assert list(there["beyond"]) == ["SFT"] and there["missing"] == {}
    gone = claims.add_controls(ATLAS, "C5", missing={"SFT": "too few seeds"})
    assert gone["beyond"] == gone["controls"] == {} and gone["missing"] == {"SFT": "too few seeds"}
    with pytest.raises(ValueError, match="the control 'SFT' is there and missing: say one of the two"):
        claims.add_controls(ATLAS, "C5", beyond={"SFT": Estimate(0.2, 0.1, 0.3)}, missing={"SFT": "too few seeds"})


def test_controls_of_a_claim_that_is_not_recorded_are_refused_and_not_written(figures_folder):
    with pytest.raises(KeyError, match="C5"):
        claims.add_controls(ATLAS, "C5", {"random": 0.0})
    assert not (figures_folder / "atlas" / "claims.json").exists()
    record("C4", Estimate(0.5, 0.4, 0.6))
    with pytest.raises(KeyError, match="C5"):
        claims.add_controls(ATLAS, "C5", {"random": 0.0})
    assert list(claims.load(ATLAS)) == ["C4"]


def test_a_new_measurement_drops_the_controls_that_were_added_to_the_old_one(figures_folder):
    record(controls={"random": 0.1})
    claims.add_controls(ATLAS, "C5", {"new": 1.0})
    record(controls={"random": 0.2})
    assert claims.load(ATLAS)["C5"]["controls"] == {"random": 0.2}


def test_controls_for_another_study_s_claim_and_those_not_finite_are_refused(figures_folder):
    record(controls={"random": 0.1})
    with pytest.raises(KeyError, match="another study"):
        claims.add_controls(ATLAS.replace(seed=1), "C5", {"new": 1.0})
    for wrong in ({"controls": {"new": math.nan}}, {"beyond": {"new": Estimate(0, math.nan, 1)}}):
        with pytest.raises(ValueError, match=r"the control 'new' is not finite .* say in `missing` why"):
            claims.add_controls(ATLAS, "C5", **wrong)
    assert claims.load(ATLAS)["C5"]["controls"] == {"random": 0.1}


def test_the_twelve_claims_stand_in_the_ledger_each_once_and_our_own_after_them():
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 13)]
    assert list(claims.ALL) == [*CLAIMS, "E1", "E2", "E4", "E6", "E7"]


def test_a_retired_claim_says_since_when_what_asks_it_now_and_what_it_had_been_found_to_be():
    assert list(claims.RETIRED) == ["E3", "E5"]
    for name, claim in claims.RETIRED.items():
        assert claim.retired.date > claim.date and "ladder" in claim.retired.what and "verdict" in claim.retired.why
        with pytest.raises(KeyError):
            record(name, Estimate(0.0, -0.1, 0.1))


def test_claims_keep_the_papers_order_and_a_later_measurement_replaces_an_earlier_one(figures_folder):
    assert claims.load(ATLAS) == {}
    for name in ("C12", "C2", "C9"):
        record(name, Estimate(-1.0, -2.0, -0.5))
    latest = record("C12", Estimate(0.7, 0.6, 0.8))
    ledger = claims.load(ATLAS)
    assert list(ledger) == ["C2", "C9", "C12"] and ledger["C12"] == latest
    assert ledger["C9"]["prediction"][0] is None  # infinity, which JSON has no word for
    path = figures_folder / "atlas" / "claims.json"
    written = path.read_bytes()
    record("C12", Estimate(0.7, 0.6, 0.8))
    assert path.read_bytes() == written


def test_entries_of_another_study_in_the_same_folder_are_dropped(figures_folder):
    """MODEL= and DATA= keep the profile's name, and a claim that they cannot test must not keep its old verdict."""
    record("C12")
    record("C5", profile=ATLAS.replace(data="atlas:belief"))
    assert list(claims.load(ATLAS)) == ["C5"]


def test_two_notebooks_that_record_at_once_lose_nothing(figures_folder, monkeypatch):
    """Each takes its time between reading the ledger and writing it."""

    def slowly(profile, load=claims.load):
        ledger = load(profile)
        time.sleep(0.02)
        return ledger

    monkeypatch.setattr(claims, "load", slowly)
    names = [("C3", "C4", "C5"), ("C1", "C9", "C12")]
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda some: [record(name) for name in some], names))
    assert set(claims.load(ATLAS)) == {*names[0], *names[1]}


def test_each_profile_has_its_own_ledger(figures_folder):
    record()
    assert claims.load(ATLAS.replace(name="another")) == {}


@pytest.mark.parametrize(
    "estimate",
    [(math.nan, 0, 1), (0.5, math.nan, 1), (0.5, 0, math.inf), (-math.inf, -math.inf, 0), (2, 0, 1), (0.5, 1, 0)],
)
def test_what_is_no_measurement_is_refused_and_not_written(figures_folder, estimate):
    with pytest.raises(ValueError, match=r"C5: .* is not a finite value within its interval"):
        record(estimate=Estimate(*estimate))
    assert not (figures_folder / "atlas" / "claims.json").exists()


def test_the_ledger_of_the_default_profile_is_committed():
    assert (places.PROJECT / "figures" / "atlas" / "claims.json").exists()


@pytest.mark.parametrize("profile, name", ENTRIES)
def test_a_committed_entry_is_about_its_claim_and_agrees_with_itself(profile, name):
    folder = places.PROJECT / "figures" / profile
    entry, about = json.loads((folder / "claims.json").read_text())[name], claims.ALL[name]
    assert name in NULLS or entry["no_effect"] == about.no_effect
    assert entry["ci_low"] <= entry["value"] <= entry["ci_high"] and entry["n"] > 0
    assert entry["value"] == pytest.approx(sum(entry["by_seed"]) / len(entry["by_seed"]), rel=1e-4, abs=1e-5)
    assert entry["prediction"] == [None if math.isinf(end) else end for end in about.region]
    assert (entry["id"], entry["statement"], entry["metric"]) == (name, about.statement, about.metric)
    assert (folder / f"{entry['figure']}.png").is_file() and (folder / f"{entry['figure']}.json").is_file()
    assert (places.PROJECT / "notebooks" / f"{entry['notebook']}.ipynb").is_file()


# --- What is said of claims ---


def test_a_text_is_filled_with_what_was_measured_and_empty_where_something_was_not(figures_folder):
    record(controls={"random": 1 / 3, "tiny": 2e-5})
    ledger = claims.load(ATLAS)
    assert claims.filled("[C5 value], not [C5 random] or [C5 tiny]", ledger) == "0.95, not 0.33 or 2e-05"
    assert claims.filled("[C5 value] and [C5 shuffled]", ledger) == claims.filled("[C4 value]", ledger) == ""
    assert claims.filled("so [C5 shuffled]; but [C5 random]; and all", ledger) == "but 0.33; and all"
    assert claims.filled("[0.1, 0.2] is no control", ledger) == "[0.1, 0.2] is no control"


@pytest.mark.parametrize(
    "x, told", [(0, "0.00"), (0.5, "0.50"), (-0.064, "-0.064"), (0.1, "0.10"), (0.003, "0.003"), (-4e-4, "-4e-04")]
)
def test_a_small_number_has_a_digit_more(x, told):
    assert claims.number(x) == told


def test_every_caveat_of_a_claim_was_measured_on_the_default_profile():
    ledger = json.loads((places.PROJECT / "figures" / "atlas" / "claims.json").read_text())
    assert claims.CLAIMS.keys() <= ledger.keys()  # ours need partners that move, such as both of a mixture's families
    for name, about in ((name, claims.ALL[name]) for name in ledger):
        assert claims.filled(about.caveat, ledger).count("; ") == about.caveat.count("; "), name
        assert not about.caveat or claims.filled(about.caveat, ledger), name
        assert set(re.findall(r"\[([CE]\d+) ", about.caveat)) <= {name}


# --- Numbered predictions ---


LISTS = {
    "controls": 7, "families": 5, "sizes": 3, "strength": 7, "labels": 2, "worlds": 6, "ladder": 8,
    "methods": 5, "pairs": 4, "smollm2": 6, "smollm2_ladder": 6,
}  # fmt: skip


@pytest.mark.parametrize("section, count", LISTS.items())
def test_predictions_are_a_numbered_list_with_the_day_that_they_were_written(section, count):
    lines = claims.predictions(section).splitlines()
    numbered = [line for line in lines if re.match(r"\d+\. \S", line)]
    assert [line.split(".")[0] for line in numbered] == [str(i + 1) for i in range(count)]
    assert re.search(r"\(\d{4}-\d\d-\d\d\)$", lines[0])
    changed = lines.index("**Changed since.**") if "**Changed since.**" in lines else len(lines)
    assert len(lines[changed:]) - 2 == len(claims.PREDICTIONS[section].changes) or changed == len(lines)


def test_a_prediction_is_scored_by_its_number_and_an_unknown_one_is_refused():
    assert claims.scored("controls", 2, True, "As said.") == "2. **Held.** As said."
    assert claims.scored("sizes", 3, False, "Not so.") == "3. **Failed.** Not so."
    for missing in (f"By {math.nan:+.2f}.", f"{Estimate(math.nan, math.nan, math.nan)}, -0.1"):
        assert claims.scored("sizes", 3, False, missing) == f"3. **Cannot be told.** {missing}"
    for number in (0, 4):
        with pytest.raises(ValueError, match=rf"no prediction {number} on sizes: predictions.toml has 3"):
            claims.scored("sizes", number, True, "")


def test_a_prediction_holds_where_every_interval_lies_inside_and_fails_where_one_lies_outside():
    inside, across, outside = (Estimate(x, x - 0.1, x + 0.1) for x in (0.5, 0.75, 1.0))
    region = (0.2, 0.8)
    assert claims.held((inside, *region)) is True and claims.held((outside, *region)) is False
    assert claims.held((inside, *region), (across, *region)) is None
    assert claims.held((across, *region), (outside, *region)) is False
    assert claims.scored("ladder", 1, None, "So.") == "1. **Undecided.** So."


def test_nothing_is_changed_before_it_was_written_and_every_change_has_a_reason():
    for about in [*claims.ALL.values(), *claims.PREDICTIONS.values()]:
        assert all(change.date >= about.date and change.what and change.why for change in about.changes)
