"""The claims ledger: what is claimed, what was predicted before measuring, what was measured, and a verdict.

predictions.toml holds claims, regions and numbered predictions, each with its date and what changed since. The ledger
holds what was measured; verdicts follow from the whole of it, by rule (`verdicts`).
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
from helpers.evidence.verdicts import ALGEBRA, TOO_WEAK, WORDS, Verdict, in_a_word, judged_together  # noqa: F401
from helpers.profiles import Profile
from helpers.settings import Settings
from helpers.stages import artifacts

ASKED = r"\[([CE]\d+) (.+?)\]"  # in a text: the number of a claim's control
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
    algebra: bool = False  # an identity, which no experiment can make more or less true
    caveat: str = ""
    changes: Annotated[tuple[Change, ...], A_LIST] = ()
    retired: Change | None = None  # it is not asked any more


class Predictions(Settings):
    """Numbered predictions on one subject."""

    date: date
    written: str  # when, and what was known then
    predictions: Annotated[tuple[str, ...], A_LIST]
    changes: Annotated[tuple[Change, ...], A_LIST] = ()


_TABLES = tomllib.loads((places.PROJECT / "predictions.toml").read_text())
CLAIMS = {name: Claim(**fields) for name, fields in _TABLES.pop("claims").items()}  # the paper's
_EVER = {name: Claim(**fields) for name, fields in _TABLES.pop("ours").items()}
OURS = {name: claim for name, claim in _EVER.items() if claim.retired is None}  # on what it leaves open
RETIRED = {name: claim for name, claim in _EVER.items() if claim.retired is not None}
ALL = CLAIMS | OURS
PREDICTIONS = {name: Predictions(**fields) for name, fields in _TABLES.items()}


def predictions(section: str) -> str:
    """The numbered predictions of a section of predictions.toml and what changed since, as Markdown."""
    found = PREDICTIONS[section]
    lines = [f"{i}. {' '.join(text.split())}" for i, text in enumerate(found.predictions, 1)]
    changed = [f"- {change.date}: {change.what} ({change.why})." for change in found.changes]
    since = ["", "**Changed since.**", "", *changed] if changed else []
    return "\n".join([f"{' '.join(found.written.split())} ({found.date})", "", *lines, *since])


def scored(section: str, number: int, holds: bool | None, text: str) -> str:
    """One line of Markdown: whether a numbered prediction held, and by what; None is undecided (`held`). Where a number
    of the text is not there (nan), nobody can tell.

    Raises ValueError for a number that the section does not have.
    """
    there_are = len(PREDICTIONS[section].predictions)
    if not 1 <= number <= there_are:
        raise ValueError(f"There is no prediction {number} on {section}: predictions.toml has {there_are}.")
    word = {None: "Undecided", True: "Held", False: "Failed"}[None if holds is None else bool(holds)]
    word = "Cannot be told" if re.search(r"\bnan\b", text) else word
    return f"{number}. **{word}.** {text}"


def held(*clauses: tuple[Estimate, float, float]) -> bool | None:
    """Whether a prediction of several clauses held: each an estimate and the region that was predicted for it. It did
    where every interval lies inside its region, it failed where one lies outside, and is undecided (None) otherwise."""
    inside = [low <= found.low and found.high <= high for found, low, high in clauses]
    outside = [found.high < low or high < found.low for found, low, high in clauses]
    return False if any(outside) else True if all(inside) else None


def verdicts(ledger: Mapping[str, Mapping]) -> dict[str, Verdict]:
    """{claim: its verdict} (evidence/verdicts.py), the paper's claims and ours adjusted for their number apart."""
    found = {}
    for family in (CLAIMS, OURS):
        entries = {name: ledger[name] for name in family if name in ledger}
        found |= judged_together(entries, [name for name in entries if family[name].algebra])
    return found


def told(entry: Mapping) -> str:
    """An entry's verdict in a line, alone: not adjusted for how many claims there are."""
    (found,) = verdicts({entry["id"]: entry}).values()
    by = f" (beside {found.decided_by})" if found.decided_by else ""
    parts = f"direction {found.direction}, size {found.size}, specific {found.specific}{by}"
    return f"{found.word}, taken alone: {parts}"


def _kept(found: Estimate) -> list[float | None]:
    """Value, low, high and the degrees of freedom, where they are finite: for infinity JSON has no word."""
    return [*map(_rounded, found[:3]), _rounded(found.df) if math.isfinite(found.df) else None]


def record(
    profile: Profile,
    claim_id: str,
    estimate: Estimate,
    n: int,
    figure: str,
    controls: Mapping[str, float] | None = None,
    null: float | None = None,
    beyond: Mapping[str, Estimate] | None = None,
    missing: Mapping[str, str] | None = None,
    varied: str = "",
) -> dict:
    """Enter an estimate from n prompts or cases into the profile's claims.json; return the entry.

    figure: the one that shows it. null: what the null gives, for a claim whose `no_effect` is MEASURED. beyond: the
    claim's number less that of each matched control, paired. missing: why a control has none. varied: what the interval
    is over. Entries of another study that was written into the same folder (another model, another seed) are dropped.
    Raises ValueError for what is no measurement.
    """
    claim = ALL[claim_id]
    value, low, high, df = _kept(estimate)
    by_seed = [*map(_rounded, estimate.by_seed)] or [value]
    if not all(map(math.isfinite, (value, low, high))) or not low <= value <= high:
        raise ValueError(f"{claim_id}: ({value}, {low}, {high}) is not a finite value within its interval.")
    if (claim.no_effect == MEASURED) != (null is not None):
        raise ValueError(f"{claim_id}: give a measured null where the claim asks for one, and nowhere else.")
    seeds = "a training seed" if len(by_seed) == 1 else f"{len(by_seed)} training seeds"
    entry = {
        "id": claim_id, "section": claim.section, "statement": claim.statement, "metric": claim.metric,
        "prediction": [None if math.isinf(end) else end for end in claim.region], "origin": claim.origin,
        "no_effect": claim.no_effect if null is None else _rounded(null), "value": value, "ci_low": low,
        "ci_high": high, "df": df, "n": n, "varied": varied or f"prompts and {seeds}", "by_seed": by_seed,
        "controls": {}, "beyond": {}, "missing": {}, "notebook": figures.notebook_of(figure), "figure": figure,
        "profile": profile.hash,
    }  # fmt: skip
    entry = _with_controls(entry, controls, beyond, missing)
    with _alone(profile):
        kept = {key: other for key, other in load(profile).items() if other.get("profile") == profile.hash}
        _write(profile, kept | {claim_id: entry})
    return entry


def _with_controls(entry: dict, controls, beyond, missing) -> dict:
    """An entry with what was measured of controls added to it. Raises ValueError for what is no measurement."""
    numbers = {name: [x] for name, x in (controls or {}).items()} | {name: x[:3] for name, x in (beyond or {}).items()}
    for name, found in numbers.items():
        if not all(map(math.isfinite, found)):
            raise ValueError(
                f"{entry['id']}: the control {name!r} is not finite ({found}): say in `missing` why there is none."
            )
    if told_twice := {*(beyond or {})} & {*(missing or {})}:
        raise ValueError(f"{entry['id']}: the control {min(told_twice)!r} is there and missing: say one of the two.")
    given = {name: _kept(x) for name, x in (beyond or {}).items()}
    still_missing = {name: why for name, why in entry["missing"].items() if name not in given} | dict(missing or {})
    further = {name: x for name, x in entry["beyond"].items() if name not in still_missing} | given
    gone = tuple(f"{name} " for name in still_missing)  # "SFT at equal strength"
    of_controls = {name: x for name, x in entry["controls"].items() if not name.startswith(gone)}
    of_controls |= {name: _rounded(x) for name, x in (controls or {}).items()}
    return entry | {"controls": of_controls, "beyond": further, "missing": still_missing}


def add_controls(
    profile: Profile,
    claim_id: str,
    controls: Mapping[str, float] | None = None,
    beyond: Mapping[str, Estimate] | None = None,
    missing: Mapping[str, str] | None = None,
) -> dict:
    """Add what a later notebook measured of controls to a claim that this study recorded; return the entry. Arguments
    as of `record`.

    Raises KeyError for a claim that it did not record and ValueError for a control that is not finite.
    """
    with _alone(profile):
        ledger = load(profile)
        if ledger[claim_id]["profile"] != profile.hash:
            raise KeyError(f"{claim_id} in {figures.folder(profile)} is of another study: run its notebook again.")
        ledger[claim_id] = _with_controls(ledger[claim_id], controls, beyond, missing)
        _write(profile, ledger)
    return ledger[claim_id]


def load(profile: Profile) -> dict[str, dict]:
    """The ledger of a profile by claim id; empty where nothing was recorded yet."""
    path = figures.folder(profile) / "claims.json"
    return json.loads(path.read_text()) if path.exists() else {}


def filled(text: str, ledger: Mapping[str, dict]) -> str:
    """A text with each [claim control] as the number that a ledger has of it (`value`: the claim's own), without the
    clauses, between semicolons, in which one was not measured."""
    known = {name: {"value": entry["value"]} | entry["controls"] for name, entry in ledger.items()}

    def is_known(clause: str) -> bool:
        return all(control in known.get(claim, {}) for claim, control in re.findall(ASKED, clause))

    kept = "; ".join(clause for clause in text.split("; ") if is_known(clause))
    return re.sub(ASKED, lambda found: number(known[found[1]][found[2]]), kept)


def number(x: float) -> str:
    """A number for a reader: two decimals, a third below a tenth, and one digit of what is smaller than they show."""
    if 0 < abs(x) < 1e-3:
        return f"{x:.0e}"
    return f"{x:.3f}" if 0 < abs(x) < 0.1 else f"{x:.2f}"


def _rounded(x: float) -> float:
    return float(f"{x:.6g}")


def _alone(profile: Profile) -> FileLock:
    """While held, no other notebook writes to the profile's ledger."""
    locks = artifacts.root() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"ledger-{profile.name}")


def _write(profile: Profile, ledger: Mapping[str, dict]) -> None:
    with places.whole(figures.folder(profile) / "claims.json", figures.VARIABLE) as path:
        path.write_text(json.dumps({key: ledger[key] for key in ALL if key in ledger}, indent=1) + "\n")
