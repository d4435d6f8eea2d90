"""A verdict has three parts and a word, by rule, on made-up entries of every kind."""

import math

import pytest
from ledgers import entry

from helpers.evidence import verdicts
from helpers.evidence.verdicts import TOO_WEAK, UNSPECIFIC

BELOW = {"region": (0.0, 0.1), "no_effect": 1.0}  # claimed below no effect
NEGATIVE = {"region": (-math.inf, -1e-9)}
SAME = {"region": (-0.05, 0.05), "no_effect": None}  # the claim is that nothing changes
AHEAD, LEVEL, BEHIND = [0.5, 0.3, 0.7], [0.1, -0.1, 0.3], [-0.5, -0.7, -0.3]  # of a control, with intervals


@pytest.mark.parametrize(
    "made, marks, word",
    [
        ({"beyond": {"SFT": AHEAD}}, ("yes", "inside", "yes"), "reproduced"),
        ({"interval": (0.8, 1.2), "beyond": {"SFT": AHEAD}}, ("yes", "inside", "yes"), "reproduced"),  # ends included
        ({"beyond": {"SFT": LEVEL}}, ("yes", "inside", "no"), UNSPECIFIC),
        ({"beyond": {"SFT": BEHIND}}, ("yes", "inside", "no"), UNSPECIFIC),
        (
            {"beyond": {"SFT": AHEAD, "random": LEVEL}},
            ("yes", "inside", "no"),
            UNSPECIFIC,
        ),  # the nearest decides
        (
            {"beyond": {"SFT": [0.2, 0.1, 0.3], "random": [0.4, -0.1, 0.9]}},
            ("yes", "inside", "no"),
            UNSPECIFIC,
        ),  # farther off, but not told from it: not all are exceeded
        ({}, ("yes", "inside", "undecided"), "undecided"),  # no control
        (
            {"beyond": {"random": AHEAD}, "missing": {"SFT": "none can be trained"}},
            ("yes", "inside", "undecided"),
            "undecided",
        ),
        ({"beyond": {"random": LEVEL}, "missing": {"SFT": "none"}}, ("yes", "inside", "no"), UNSPECIFIC),
        (
            {"beyond": {"random": AHEAD}, "missing": {"shuffled": TOO_WEAK}},
            ("yes", "inside", "yes"),
            "reproduced",
        ),
        ({"interval": (0.3, 0.5), "beyond": {"SFT": AHEAD}}, ("yes", "outside", "yes"), "another size"),
        ({"interval": (1.5, 1.9)}, ("yes", "outside", "undecided"), "another size"),
        ({"interval": (0.7, 0.9), "beyond": {"SFT": AHEAD}}, ("yes", "across", "yes"), "undecided"),
        ({"interval": (-0.5, -0.1)}, ("no", "outside", "undecided"), "not reproduced"),  # the other side
        ({"interval": (-0.1, 0.5)}, ("no", "outside", "undecided"), "not reproduced"),  # no effect, and not the region
        ({"interval": (-0.1, 0.9)}, ("undecided", "across", "undecided"), "undecided"),  # both
        ({"interval": (0.02, 0.08), "beyond": {"SFT": BEHIND}} | BELOW, ("yes", "inside", "yes"), "reproduced"),
        ({"interval": (0.02, 0.08), "beyond": {"SFT": AHEAD}} | BELOW, ("yes", "inside", "no"), UNSPECIFIC),
        ({"interval": (0.2, 0.4)} | BELOW, ("yes", "outside", "undecided"), "another size"),
        ({"interval": (1.1, 1.3)} | BELOW, ("no", "outside", "undecided"), "not reproduced"),
        ({"interval": (-2.0, -0.5), "beyond": {"SFT": BEHIND}} | NEGATIVE, ("yes", "inside", "yes"), "reproduced"),
        ({"interval": (0.1, 0.2)} | NEGATIVE, ("no", "outside", "undecided"), "not reproduced"),
        ({"interval": (-0.1, 0.1)} | NEGATIVE, ("undecided", "across", "undecided"), "undecided"),
        ({"interval": (-0.04, 0.05)} | SAME, ("—", "inside", "—"), "reproduced"),
        ({"interval": (-0.06, 0.01)} | SAME, ("—", "across", "—"), "undecided"),
        ({"interval": (0.051, 0.2)} | SAME, ("—", "outside", "—"), "not reproduced"),
        (
            {"interval": (1e-12, 1e-12), "region": (0, 1e-10), "no_effect": None, "name": "C1"},
            ("—", "inside", "—"),
            "algebra",
        ),
        (
            {"interval": (1e-3, 1e-3), "region": (0, 1e-10), "no_effect": None, "name": "C1"},
            ("—", "outside", "—"),
            "not reproduced",
        ),
    ],
)
def test_a_verdict_has_three_parts_and_a_word_each_by_rule(made, marks, word):
    one = entry(**made)
    found = verdicts.judged_together({one["id"]: one}, {"C1"})[one["id"]]
    assert found[:4] == (*marks, word) and word in verdicts.WORDS
    assert verdicts.in_a_word(marks, algebra=one["id"] == "C1") == word
    assert (
        found.decided_by
        == verdicts.strongest(one)
        == ("random" if "random" in one["beyond"] else "SFT" if one["beyond"] else "")
    )


def test_what_adjusting_leaves_open_is_undecided_and_not_refused():
    """An interval that holds no effect and nothing of the region is a no; one that excludes no effect until its p is
    adjusted, as of ten claims, is none."""
    weak = {"interval": (0.02, 0.40), "beyond": {"SFT": AHEAD}}
    alone = verdicts.judged_together({"C6": entry(**weak)}, set())["C6"]
    assert alone[:2] == ("yes", "outside") and alone.word == "another size"
    many = verdicts.judged_together({f"C{i}": entry(name=f"C{i}", **weak) for i in range(10)}, set())
    assert {found[:2] for found in many.values()} == {("undecided", "outside")}
    assert {found.word for found in many.values()} == {"undecided"}


def test_the_control_that_decides_is_the_one_least_told_by_p_whatever_its_degrees_of_freedom():
    """A lead of 1.24 over few seeds tells less than one of 1.20 over many prompts, though in its own width it is
    larger; and a control that is ahead decides before any."""
    one = entry()
    one["beyond"] = {"random": [1.20, 0.2, 2.2, None], "SFT": [1.24, 0.24, 2.24, 2.0]}
    assert verdicts.strongest(one) == "SFT"
    one["beyond"]["shuffled"] = [-0.1, -0.6, 0.4, None]
    assert verdicts.strongest(one) == "shuffled"
