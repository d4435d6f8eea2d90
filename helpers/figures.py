"""One style for all figures, and saving them with the numbers they draw, byte-stable."""

import ast
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from helpers import places
from helpers.estimates import Estimate
from helpers.profiles import Profile

# One colour a thing in every figure (Okabe and Ito's palette: safe for colour-blind readers, distinct in greyscale).
COLOURS = {
    "base": "#555555",
    "dpo": "#0072B2",
    "steered": "#D55E00",
    "desteered": "#009E73",
    "token": "#CC79A7",
    "random": "#B8B8B8",
}
LABELS = {
    "base": "base",
    "dpo": "DPO",
    "steered": r"base $+\,\lambda v^*$",
    "desteered": r"DPO $-\,\lambda v^*$",
    "token": r"$\lambda v_{\rm token}$",
    "random": "random, equal norm",
}
NOTEBOOKS = places.PROJECT / "notebooks"
VARIABLE = "DSTEER_FIGURES"  # of the environment: where figures go instead
FONT = "DejaVu Sans"
WIDTH = 7.0  # inches; every figure is this wide


def use_style() -> None:
    """Set matplotlib up for all figures of a notebook."""
    sns.set_theme(context="paper", style="ticks", font=FONT, font_scale=1.05)
    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
        }
    )


def save_figure(
    figure: Figure, profile: Profile, name: str, caption: str, claims: Sequence[str], numbers: dict
) -> None:
    """Write `<name>.png` and `<name>.json` (caption, claim ids, notebook, the numbers drawn) into the profile's folder.

    numbers: what the figure draws, by curve or panel; arrays become lists. The bytes depend on nothing else. Raises
    ValueError where `notebook_of` does.
    """
    about = {
        "caption": " ".join(caption.split()),
        "claims": list(claims),
        "notebook": notebook_of(name),
        "numbers": _plain(numbers),
    }
    target = folder(profile)
    with places.whole(target / f"{name}.png", VARIABLE) as path:
        figure.savefig(path, format="png", metadata={"Software": None})
    with places.whole(target / f"{name}.json", VARIABLE) as path:
        path.write_text(json.dumps(about, indent=1, sort_keys=True, allow_nan=False) + "\n")


def notebook_of(name: str) -> str:
    """The notebook whose code saves the figure of this name, written out in the call of `save_figure`.

    Raises ValueError where none of notebooks/ does, or several do.
    """
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    found = [path.stem for path in paths if name in _saved_by(path, path.stat().st_mtime_ns)]
    if len(found) != 1:
        raise ValueError(
            f"{', '.join(found) or 'No notebook'} of {NOTEBOOKS.name}/ saves a figure called {name!r}: one notebook "
            "must, and name it in its call of save_figure."
        )
    return found[0]


@cache
def _saved_by(notebook: Path, _changed: int) -> frozenset[str]:
    """The words in a notebook's calls of `save_figure`, the figure's name among them."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for source in code for node in ast.walk(ast.parse(source))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("save_figure")]
    return frozenset(word.value for call in calls for word in call.args if isinstance(word, ast.Constant))


def folder(profile: Profile) -> Path:
    """Where a profile's figures go: `figures/<profile>/` in the project, or below the folder DSTEER_FIGURES names."""
    return places.folder_from(VARIABLE, "figures") / profile.name


# --- Estimates, drawn: each is (value, low, high, ...); several are a list, or a table with a column for each. A colour
# is one of COLOURS or matplotlib's. `look` goes to matplotlib. ---


def rows(axes: Axes, estimates, y, colour, bars: bool = True, **look) -> None:
    """Points with horizontal intervals at heights y, or without intervals."""
    value, arms = _value_and_arms(estimates)
    look = {"fmt": "o", "color": COLOURS.get(colour, colour)} | look
    axes.errorbar(value, np.broadcast_to(y, value.shape), xerr=arms if bars else None, **look)


def points(axes: Axes, x, estimates, colour, **look) -> None:
    """Points with vertical intervals at places x."""
    value, arms = _value_and_arms(estimates)
    axes.errorbar(x, value, yerr=arms, **{"fmt": "o", "color": COLOURS.get(colour, colour)} | look)


def curve(axes: Axes, x, estimates, role: str, **look) -> None:
    """A line with its intervals as a band."""
    value, low, high = _columns(estimates)
    axes.plot(x, value, color=COLOURS[role], **look)
    band(axes, x, low, high, role)


def band(axes: Axes, x, low, high, role: str) -> None:
    """Shade an interval in a role's colour."""
    axes.fill_between(x, low, high, color=COLOURS[role], alpha=0.18, linewidth=0)


def nothing_and_all(axes: Axes, lw: float = 0.8) -> None:
    """Mark the shares 0, nothing, and 1, all of the way to the DPO model."""
    axes.axvline(0, color="black", lw=lw)
    axes.axvline(1, color=COLOURS["dpo"], lw=lw, ls="--")


def legend_above(figure: Figure, axes: Axes, ncols: int, **look) -> None:
    """One legend for a figure, of what one of its panels shows."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=ncols, **look)


def thin_ticks(axes: Axes, labels: Sequence[str], most: int = 12) -> None:
    """Of more than `most` categories along x, such as the sites of a deep model, name some alone."""
    if len(labels) > most:
        step = -(-len(labels) // most)
        axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=45)


def blank(panels: np.ndarray, used: int) -> None:
    """Hide the panels after the first `used`."""
    for axes in panels.flat[used:]:
        axes.axis("off")


def _columns(estimates) -> np.ndarray:
    """Values, low and high ends, (3, N)."""
    if isinstance(estimates, pd.DataFrame):
        return estimates.to_numpy(dtype=float)[:, :3].T
    several = [estimates] if np.isscalar(estimates[0]) else estimates
    return np.array([tuple(one)[:3] for one in several], dtype=float).reshape(-1, 3).T


def _value_and_arms(estimates) -> tuple[np.ndarray, np.ndarray]:
    """Values, (N,), and how far each interval reaches below and above, (2, N), not less than 0 by rounding."""
    value, low, high = _columns(estimates)
    return value, np.maximum([value - low, high - value], 0)


def token_label(token: str) -> str:
    """A token as a label: spaces seen, no mathematics between dollars, and `drawable`."""
    return drawable(token.replace(" ", "␣")).replace("$", r"\$")


def drawable(text: str) -> str:
    """A text with what the font has no picture of, such as Chinese or a line's end, as its escape."""
    return "".join(c if _is_drawn(c) else c.encode("unicode_escape").decode() for c in text)


@cache
def _is_drawn(character: str) -> bool:
    return character.isprintable() and get_font(findfont(FONT)).get_char_index(ord(character)) > 0


def _plain(value):
    """What JSON can hold: arrays and tensors as lists, numbers to six digits, null for those that are not finite."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Estimate):  # without its degrees of freedom, which nothing of it is drawn by
        return _plain([*value[:3], value.by_seed])
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    found = np.asarray(value).tolist()
    if isinstance(found, list):
        return _plain(found)
    return (float(f"{found:.6g}") if math.isfinite(found) else None) if isinstance(found, float) else found
