"""A claim's verdict, in three parts and in a word, by rule from what a ledger holds of it.

An entry is what `claims.record` makes: the number and its interval, the claimed region, what would be no effect, and
the claim's number less that of each matched control (`beyond`).
"""

import math
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from helpers.estimates import Estimate, holm

YES, NO, UNDECIDED, NONE = "yes", "no", "undecided", "—"  # the marks of a verdict's parts; NONE: not asked
ALGEBRA, REPRODUCED, UNSPECIFIC = "algebra", "reproduced", "holds, but not shown to be specific to DPO"
ANOTHER_SIZE, NOT_REPRODUCED = "another size", "not reproduced"
WORDS = (ALGEBRA, REPRODUCED, UNSPECIFIC, ANOTHER_SIZE, UNDECIDED, NOT_REPRODUCED)
TOO_WEAK = "its run never gets as far from the base as DPO is"  # why a control is missing: it does not do as much
LEVEL = 0.05  # of all claims together (Holm)


class Verdict(NamedTuple):
    """direction: whether there is an effect on the claimed side, by an adjusted p below LEVEL. size: whether the
    interval lies inside the claimed region. specific: whether the number exceeds that of the strongest matched control,
    `decided_by`, by such a p."""

    direction: str
    size: str
    specific: str
    word: str
    decided_by: str


def side(entry: Mapping) -> int:
    """On which side of no effect the claimed region lies: 1 above it, -1 below, 0 where nothing would be no effect."""
    if entry["no_effect"] is None:
        return 0
    low, high = region(entry)
    return 1 if low + high > 2 * entry["no_effect"] else -1


def region(entry: Mapping) -> tuple[float, float]:
    """Where the number is claimed to lie, both ends included."""
    low, high = entry["prediction"]
    return -math.inf if low is None else low, math.inf if high is None else high


def size(entry: Mapping) -> str:
    """Whether the interval lies "inside" the claimed region, "outside" it, or "across" its edge."""
    low, high = region(entry)
    if low <= entry["ci_low"] and entry["ci_high"] <= high:
        return "inside"
    return "across" if entry["ci_low"] <= high and low <= entry["ci_high"] else "outside"


def direction(entry: Mapping, p: float) -> str:
    """Whether there is an effect on the claimed side: "no" where it lies on the other side, or where the interval holds
    no effect and nothing of the claimed region. p: of no effect, adjusted for the number of claims."""
    if not side(entry):
        return NONE
    if p < LEVEL:
        return YES if side(entry) * (entry["value"] - entry["no_effect"]) > 0 else NO
    holds_none = entry["ci_low"] <= entry["no_effect"] <= entry["ci_high"]  # by itself: adjusting makes nothing surer
    return NO if holds_none and size(entry) == "outside" else UNDECIDED


def strongest(entry: Mapping) -> str:
    """The matched control from which the claim is told the least: the largest p, of one side, of exceeding it by no
    more than nothing; empty where none could be had."""

    def least_told(name: str) -> tuple[float, float]:
        found = _estimate(entry["beyond"][name])
        lead = side(entry) * found.value
        return (found.p(0) / 2 if lead > 0 else 1 - found.p(0) / 2), -lead

    return max(entry["beyond"] if side(entry) else (), key=least_told, default="")


def specific(entry: Mapping, p: float) -> str:
    """Whether the claim's number exceeds that of its strongest matched control; undecided where it does, but a control
    that might be stronger is missing. p: of no difference, adjusted."""
    if not side(entry):
        return NONE
    name = strongest(entry)
    if name and not (p < LEVEL and side(entry) * entry["beyond"][name][0] > 0):
        return NO
    return YES if name and set(entry["missing"].values()) <= {TOO_WEAK} else UNDECIDED


def in_a_word(marks: tuple[str, str, str], algebra: bool = False) -> str:
    """The verdict in words, from its three marks."""
    of_direction, of_size, of_specific = marks
    if of_direction == NONE:  # nothing is claimed to change
        found = {"inside": REPRODUCED, "outside": NOT_REPRODUCED, "across": UNDECIDED}[of_size]
        return ALGEBRA if algebra and found == REPRODUCED else found
    if of_direction == NO:
        return NOT_REPRODUCED
    if of_direction == YES and of_size == "outside":
        return ANOTHER_SIZE
    if of_direction == YES and of_size == "inside":
        return {YES: REPRODUCED, NO: UNSPECIFIC}.get(of_specific, UNDECIDED)
    return UNDECIDED


def judged_together(entries: Mapping[str, Mapping], algebra: Container[str]) -> dict[str, Verdict]:
    """{claim: its verdict}, p-values adjusted for the number of entries that ask (Holm), for direction and for specific
    by themselves. algebra: the claims that are identities."""
    asked = {name: entry for name, entry in entries.items() if side(entry)}
    own = {name: [entry[part] for part in ("value", "ci_low", "ci_high", "df")] for name, entry in asked.items()}
    of_effect = {name: _estimate(own[name]).p(entry["no_effect"]) for name, entry in asked.items()}
    nearest = {name: strongest(entry) for name, entry in asked.items() if strongest(entry)}
    of_control = {name: _estimate(asked[name]["beyond"][control]).p(0) for name, control in nearest.items()}
    effect, control = holm(of_effect), holm(of_control)
    found = {}
    for name, entry in entries.items():
        marks = direction(entry, effect.get(name, 1)), size(entry), specific(entry, control.get(name, 1))
        found[name] = Verdict(*marks, in_a_word(marks, name in algebra), strongest(entry))
    return found


def _estimate(kept: Sequence[float | None]) -> Estimate:
    *found, df = kept
    return Estimate(*found, df=math.inf if df is None else df)
