"""Write what follows from figures/ alone (`make readme`): README.md's answers and scorecard, and every profile's
gallery, figures/<profile>/README.md."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from helpers import claims, places
from helpers.evidence.verdicts import ALGEBRA, NONE, Verdict
from tools.headless import PAGES

DEFAULT_PROFILE = "atlas"
WORLDS = "worlds"  # the profile whose ledger is over several worlds
REAL = "smollm2"  # the one of a real language model, which stands beside it
NAMES = {"base": "base", "steered": "base + v\\*", "desteered": "DPO − v\\*", "dpo": "DPO"}
RUNGS = {
    "v*": "v\\*", "v_opt": "v_opt", "two, by a probe of the prompt": "two, by a probe",
    "head, full rank": "the head alone", "trained at all block sites": "one in every block",
    "adapter, rank 1": "the adapter, rank 1",
}  # fmt: skip
PAPER = ("fig1a", "fig1b", "fig1c", "fig2a", "fig2b", "fig3", "fig4a", "fig4b")


def rendered(text: str, root: Path) -> str:
    """The README's text with every block between `<!-- name -->` and `<!-- /name -->` written anew.
    Raises ValueError for a block whose markers are not there exactly once."""
    folder = root / "figures" / DEFAULT_PROFILE
    of_worlds = _ledger(folder) | _ledger(root / "figures" / WORLDS)  # of several worlds where they were asked
    scores = scorecard(of_worlds, claims.CLAIMS, _ledger(root / "figures" / REAL))
    blocks = {"answers": answers(folder), "scorecard": scores, "ladder": ladder(folder, root / "figures" / REAL)}
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md must hold the markers of the block {name!r} exactly once, found {found}.")
    return text


def scorecard(ledger: dict[str, dict], asked: Iterable[str], real: dict[str, dict]) -> str:
    """A row a claim: what it says in plain words, what was measured, the verdict and what its reader has to know, and
    what a real language model's ledger says of it, in bold where its verdict is another one."""
    lines = ["| It says | Measured | Verdict | To know | SmolLM2-135M |", "|---|---|---|---|---|"]
    verdicts, of_real = claims.verdicts(ledger), claims.verdicts(real)
    for name in (name for name in asked if name in ledger):
        claim, entry = claims.ALL[name], ledger[name]
        over = "" if claim.algebra else f"; over {entry['varied']}"
        measured = f"{claim.quantity} {_measured(entry)}; claimed {_region(entry)}{over}"
        known = claims.filled(claim.caveat, ledger)
        beside = _beside(real[name], of_real[name], verdicts[name]) if name in real else ""
        lines.append(_row(f"**{name}** {claim.plain}", measured, _verdict(verdicts[name]), known, beside))
    return "\n".join(lines)


def _verdict(found: Verdict) -> str:
    """The word and, where they were asked, the three parts."""
    beside = f" beside {found.decided_by}" if found.decided_by else ""
    parts = {"direction": found.direction, "size": found.size, "specific": f"{found.specific}{beside}"}
    asked = "; ".join(f"{part} {mark}" for part, mark in parts.items() if mark != NONE)
    return f"**{found.word}** ({asked})"


def _beside(entry: dict, found: Verdict, other: Verdict) -> str:
    """Another model's number and its verdict in a word."""
    word = found.word if found.word == other.word else f"**{found.word}**"
    return word if found.word == ALGEBRA else f"{_measured(entry)}: {word}"


def answers(folder: Path) -> str:
    """What the four models say to one prompt at dose 1, as the figure of one prompt has it."""
    (about,) = [about for about in _drawn(folder) if {"answers", "doses"} <= about["numbers"].keys()]
    at = about["numbers"]["doses"].index(1.0)
    prompt = re.search(r"prompt \((.*?)\) at", about["caption"])[1]
    lines = [_row(name, about["numbers"]["answers"][role][at]) for role, name in NAMES.items()]
    return "\n".join([_row("Model", prompt), "|---|---|", *lines])


def ladder(folder: Path, real: Path) -> str:
    """The share of KL(DPO || base) that some rungs remove, a row a family and its strength, as the ladder's figure has
    them, and of the families of a real language model, where it has one."""
    of_real = {f"{name}, SmolLM2": rungs for name, rungs in _rungs(real).items()}
    families = _rungs(folder) | of_real
    lines = [_row("", *RUNGS.values()), "|---" * (1 + len(RUNGS)) + "|"]
    for name, rungs in families.items():
        shares = [rungs[rung]["KL"][:3] for rung in RUNGS]
        told = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in shares]
        strength = f" ({rungs['strength']:.2f} nats)" if "strength" in rungs else ""  # a figure from before it was kept
        lines.append(_row(name + strength, *told))
    return "\n".join(lines)


def _rungs(folder: Path) -> dict[str, dict]:
    """By family, the rungs of a profile's figure of the ladder."""
    drawn = (about["numbers"] for about in _drawn(folder))
    has_rungs = (numbers for numbers in drawn if numbers and all(map(_are_rungs, numbers.values())))
    return next(has_rungs, {})


def _are_rungs(numbers) -> bool:
    return isinstance(numbers, dict) and RUNGS.keys() <= numbers.keys()


def _drawn(folder: Path) -> list[dict]:
    """What a profile's figures say of themselves."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("fig*.json"))]


def gallery(folder: Path) -> str:
    """A profile's page: all claims with their controls, and every figure with its caption, the paper's first."""
    paths = sorted(folder.glob("fig*.json"), key=lambda path: (not path.stem.startswith(PAPER), path.stem))
    figures = "\n".join(_figure(path.stem, json.loads(path.read_text()), folder) for path in paths)
    page = " One page about its pair, with a dose slider: [report.html](report.html), for a browser."
    written = "Written by `make readme` from the files beside it." + page * (folder / "report.html").exists()
    return (
        f"# What `make figures PROFILE={folder.name}` drew\n\n{written}\n\n"
        f"## Claims\n\n{claims_table(_ledger(folder), folder)}\n\n## Figures\n\n{figures}"
    )


def claims_table(ledger: dict[str, dict], folder: Path) -> str:
    """A row a claim: what is claimed, where it is tested, what was measured beside which controls, the verdict."""
    head = _row("Claim", "Statement", "Notebook", "Figure", "Measured", "Predicted", "Verdict")
    verdicts = claims.verdicts(ledger)
    rows = [_whole(name, entry, _verdict(verdicts[name]), folder) for name, entry in ledger.items()]
    return "\n".join([head, "|---" * 7 + "|", *rows])


def _whole(name: str, entry: dict, verdict: str, folder: Path) -> str:
    controls = "; ".join(f"{key}: {claims.number(value)}" for key, value in entry["controls"].items())
    measured = f"{entry['metric']}: **{_measured(entry)}**"
    if len(entry["by_seed"]) > 1:
        measured += f", each {', '.join(map(claims.number, entry['by_seed']))}"
    measured += f", n = {entry['n']}" + (f"<br><sub>{controls}</sub>" if controls else "")
    figure = f"[{entry['figure']}]({entry['figure']}.png)"
    claim = f"{name} (§ {entry['section']})"
    return _row(claim, entry["statement"], _link(entry["notebook"], folder), figure, measured, _region(entry), verdict)


def _figure(name: str, about: dict, folder: Path) -> str:
    title = name.split("_")[0].replace("fig", "Figure ") if name.startswith(PAPER) else name
    return (
        f"### {title}\n\n![{name}]({name}.png)\n\n{about['caption']} (Notebook {_link(about['notebook'], folder)}.)\n"
    )


def _link(notebook: str, folder: Path) -> str:
    """To the executed page beside the figures, where it is kept there, and to the notebook elsewhere."""
    own = f"{PAGES}/{notebook}.ipynb"
    return f"[{notebook[:2]}]({own if (folder / own).exists() else f'../../notebooks/{notebook}.ipynb'})"


def _ledger(folder: Path) -> dict[str, dict]:
    path = folder / "claims.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _measured(entry: dict) -> str:
    """The value with its interval, where it has one."""
    interval = f" [{claims.number(entry['ci_low'])}, {claims.number(entry['ci_high'])}]"
    return claims.number(entry["value"]) + (interval if entry["ci_low"] < entry["ci_high"] else "")


def _region(entry: dict) -> str:
    low, high = entry["prediction"]
    if low is None or high is None:
        end = high if low is None else low
        return f"{'below' if low is None else 'above'} {claims.number(end) if abs(end) > 1e-6 else 0}"
    return f"{claims.number(low)} to {claims.number(high)}"


def main() -> None:
    root = places.PROJECT
    for path in sorted((root / "figures").glob("*/claims.json")):
        (path.parent / "README.md").write_text(gallery(path.parent))
    readme = root / "README.md"
    readme.write_text(rendered(readme.read_text(), root))


if __name__ == "__main__":
    main()
