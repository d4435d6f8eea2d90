"""Write the generated parts of README.md from figures/: `python -m helpers.readme` (or `make readme`)."""

import json
import re
from pathlib import Path

from helpers import artifacts, claims

PAPER = ("fig1a", "fig1b", "fig1c", "fig2a", "fig2b", "fig3", "fig4a", "fig4b")


def rendered(text: str, root: Path) -> str:
    """The README's text with every block between `<!-- name -->` and `<!-- /name -->` written anew."""
    blocks = {
        "claims": claims_table(root, "atlas"),
        "ours": claims_table(root, "atlas", claims.OURS, "We predicted that"),
        "figures": gallery(root, "atlas"),
        "tinystories-claims": claims_table(root, "tinystories"),
        "tinystories": gallery(root, "tinystories"),
    }
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md must hold the markers of the block {name!r} exactly once, found {found}.")
    return text


def claims_table(
    root: Path, profile: str, asked: dict[str, claims.Claim] = claims.CLAIMS, says: str = "The paper says"
) -> str:
    """A row a claim: what is claimed, where it is tested, what was measured, the verdict."""
    path = root / "figures" / profile / "claims.json"
    if not path.exists():
        return f"Not measured yet: `make figures PROFILE={profile}` does."
    ledger = json.loads(path.read_text())
    lines = [
        f"| Claim | {says} | Notebook | Figure | We measured | Predicted | Verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in asked:
        if name in ledger:
            lines.append(_row(name, ledger[name], profile))
    return "\n".join(lines)


def _row(name: str, entry: dict, profile: str) -> str:
    figure = f"[{entry['figure']}](figures/{profile}/{entry['figure']}.png)"
    notebook = f"[{entry['notebook'][:2]}](notebooks/{entry['notebook']}.ipynb)"
    controls = "; ".join(f"{key}: {_number(value)}" for key, value in entry["controls"].items())
    measured = f"**{_number(entry['value'])}**"
    if entry["ci_low"] < entry["ci_high"]:
        measured += f" [{_number(entry['ci_low'])}, {_number(entry['ci_high'])}]"
    if len(entry["by_seed"]) > 1:
        measured += f", seeds {', '.join(map(_number, entry['by_seed']))}"
    measured += f", n = {entry['n']}" + (f"<br><sub>{controls}</sub>" if controls else "")
    low, high = ("∞" if end is None else _number(end) for end in entry["prediction"])
    low = "−∞" if low == "∞" else low
    cells = [
        f"**{name}** (§ {entry['section']})", entry["statement"], notebook, figure,
        f"{entry['metric']}: {measured}", f"{low} to {high}", entry["verdict"],
    ]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def gallery(root: Path, profile: str) -> str:
    """Every figure of a profile with its generated caption, the paper's first."""
    folder = root / "figures" / profile
    names = sorted(path.stem for path in folder.glob("fig*.json"))
    if not names:
        return f"Not drawn yet: `make figures PROFILE={profile}` does."
    ordered = [n for n in names if n.startswith(PAPER)] + [n for n in names if not n.startswith(PAPER)]
    parts = []
    for name in ordered:
        about = json.loads((folder / f"{name}.json").read_text())
        title = name.split("_")[0].replace("fig", "Figure ") if name.startswith(PAPER) else name
        parts.append(
            f"**{title}** · notebook [{about['notebook'][:2]}](notebooks/{about['notebook']}.ipynb)\n\n"
            f"![{name}](figures/{profile}/{name}.png)\n\n{about['caption']}\n"
        )
    return "\n".join(parts)


def _number(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if 0 < abs(value) < 0.1 else f"{value:.2f}"


def main() -> None:
    path = artifacts.PROJECT / "README.md"
    path.write_text(rendered(path.read_text(), artifacts.PROJECT))


if __name__ == "__main__":
    main()
