"""The claims ledger: what is claimed, what was predicted before measuring, what was measured, and a verdict.

predictions.toml holds claims, regions and numbered predictions, each with its date and what changed since. The verdict
follows by rule from the measured interval alone.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import Field

from helpers import figures, places
from helpers.estimates import Estimate
from helpers.profiles import Profile
from helpers.settings import Settings
from helpers.stages import artifacts

VERDICTS = ("reproduced", "partly", "not reproduced", "cannot tell")
MEASURED = "measured"  # a `no_effect` that `record` is told: what the null gives
A_LIST = Field(strict=False)  # in TOML, of what is a tuple here


class Change(Settings):
    """What was changed after a claim or a prediction entered the repository, and why."""

    date: date
    what: str
    why: str


class Claim(Settings):
    """A claim, the one number that tests it and where it must lie. predictions.toml says what each field is."""

    section: str
    statement: str
    metric: str
    region: Annotated[tuple[float, float], A_LIST]
    origin: str  # where the region comes from
    date: date
    plain: str
    quantity: str
    no_effect: float | Literal["measured"] | None = None
    label: str = ""
    control: str = ""
    caveat: str = ""
    changes: Annotated[tuple[Change, ...], A_LIST] = ()


class Predictions(Settings):
    """Numbered predictions on one subject."""

    date: date
    written: str  # when, and what was known then
    predictions: Annotated[tuple[str, ...], A_LIST]
    changes: Annotated[tuple[Change, ...], A_LIST] = ()


_TABLES = tomllib.loads((places.PROJECT / "predictions.toml").read_text())
CLAIMS = {name: Claim(**fields) for name, fields in _TABLES.pop("claims").items()}  # the paper's
OURS = {name: Claim(**fields) for name, fields in _TABLES.pop("ours").items()}  # on what it leaves open
ALL = CLAIMS | OURS
PREDICTIONS = {name: Predictions(**fields) for name, fields in _TABLES.items()}


def predictions(section: str) -> str:
    """The numbered predictions of a section of predictions.toml and what changed since, as Markdown."""
    found = PREDICTIONS[section]
    lines = [f"{i}. {' '.join(text.split())}" for i, text in enumerate(found.predictions, 1)]
    changed = [f"- {change.date}: {change.what} ({change.why})." for change in found.changes]
    since = ["", "**Changed since.**", "", *changed] if changed else []
    return "\n".join([f"{found.written} ({found.date})", "", *lines, *since])


def scored(section: str, number: int, holds: bool, text: str) -> str:
    """One line of Markdown: whether a numbered prediction held, and by what.

    Raises ValueError for a number that the section does not have.
    """
    there_are = len(PREDICTIONS[section].predictions)
    if not 1 <= number <= there_are:
        raise ValueError(f"There is no prediction {number} on {section}: predictions.toml has {there_are}.")
    return f"{number}. **{'Held' if holds else 'Failed'}.** {text}"


def verdict(low: float, high: float, region: tuple[float, float], no_effect: float | None) -> str:
    """The verdict on an interval [low, high].

    reproduced: all of it lies in the predicted region. cannot tell: it touches the region but also holds the value that
    would mean no effect (or, where there is none, reaches out of the region). partly: it lies beyond no effect on the
    predicted side, but not all in the region. not reproduced: anything else.
    """
    inside_low, inside_high = region
    if inside_low <= low and high <= inside_high:
        return "reproduced"
    touches = low <= inside_high and inside_low <= high
    if no_effect is None:
        return "cannot tell" if touches else "not reproduced"
    if low <= no_effect <= high:
        return "cannot tell" if touches else "not reproduced"
    predicted_above = (inside_low + inside_high) / 2 > no_effect
    found_above = low > no_effect
    return "partly" if predicted_above == found_above else "not reproduced"


def record(
    profile: Profile,
    claim_id: str,
    estimate: Estimate,
    n: int,
    figure: str,
    controls: Mapping[str, float] | None = None,
    null: float | None = None,
) -> dict:
    """Enter an estimate from n prompts or cases into the profile's claims.json; return the entry.

    figure: the name of the figure that shows it; the notebook that saves it is entered too.
    null: what the null gives, for a claim whose `no_effect` is MEASURED. Entries of another study that was written
    into the same folder (another model, another seed) are dropped. Raises ValueError for what is no measurement.
    """
    claim = ALL[claim_id]
    value, low, high = map(_rounded, estimate[:3])
    by_seed = [*map(_rounded, estimate.by_seed)] or [value]
    if not all(map(math.isfinite, (value, low, high))) or not low <= value <= high:
        raise ValueError(f"{claim_id}: ({value}, {low}, {high}) is not a finite value within its interval.")
    if (claim.no_effect == MEASURED) != (null is not None):
        raise ValueError(f"{claim_id}: give a measured null where the claim asks for one, and nowhere else.")
    no_effect = claim.no_effect if null is None else _rounded(null)
    entry = {
        "id": claim_id, "section": claim.section, "statement": claim.statement, "metric": claim.metric,
        "prediction": [None if math.isinf(end) else end for end in claim.region], "origin": claim.origin,
        "no_effect": no_effect, "value": value, "ci_low": low, "ci_high": high, "n": n,
        "seeds": [profile.seed + k for k in range(len(by_seed))], "by_seed": by_seed,
        "controls": {name: _rounded(x) for name, x in (controls or {}).items()},
        "verdict": verdict(low, high, claim.region, no_effect), "notebook": figures.notebook_of(figure),
        "figure": figure, "profile": profile.hash,
    }  # fmt: skip
    with _alone(profile):
        kept = {key: other for key, other in load(profile).items() if other.get("profile") == profile.hash}
        _write(profile, kept | {claim_id: entry})
    return entry


def add_controls(profile: Profile, claim_id: str, controls: Mapping[str, float]) -> None:
    """Add controls that a later notebook measured to a claim that this study recorded.

    Raises KeyError for a claim that it did not record and ValueError for a control that is not finite.
    """
    if not all(map(math.isfinite, controls.values())):
        raise ValueError(f"{claim_id}: a control is not finite ({controls}): leave out what could not be measured.")
    with _alone(profile):
        ledger = load(profile)
        entry = ledger[claim_id]
        if entry["profile"] != profile.hash:
            raise KeyError(f"{claim_id} in {figures.folder(profile)} is of another study: run its notebook again.")
        entry["controls"] |= {name: _rounded(x) for name, x in controls.items()}
        _write(profile, ledger)


def load(profile: Profile) -> dict[str, dict]:
    """The ledger of a profile by claim id; empty where nothing was recorded yet."""
    path = figures.folder(profile) / "claims.json"
    return json.loads(path.read_text()) if path.exists() else {}


def filled(text: str, ledger: Mapping[str, dict]) -> str:
    """A text with each [claim control] as the number that a ledger has of it (`value`: the claim's own); empty where
    one of them was not measured."""
    known = {name: {"value": entry["value"]} | entry["controls"] for name, entry in ledger.items()}
    asked = re.findall(r"\[([CE]\d+) (.+?)\]", text)
    if any(control not in known.get(claim, {}) for claim, control in asked):
        return ""
    return re.sub(r"\[([CE]\d+) (.+?)\]", lambda found: number(known[found[1]][found[2]]), text)


def number(x: float) -> str:
    """A number for a reader: two decimals, and one digit of what is smaller than they can show."""
    return f"{x:.0e}" if 0 < abs(x) < 1e-3 else f"{x:.2f}"


def _rounded(x: float) -> float:
    return float(f"{x:.6g}")


def _alone(profile: Profile) -> FileLock:
    """While held, no other notebook writes to the profile's ledger."""
    locks = artifacts.root() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"ledger-{profile.name}")


def _write(profile: Profile, ledger: Mapping[str, dict]) -> None:
    path = figures.folder(profile) / "claims.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: ledger[key] for key in ALL if key in ledger}, indent=1) + "\n")
