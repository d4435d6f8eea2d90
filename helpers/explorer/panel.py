"""How the explorer looks: a sheet drawn once, and a panel whose every part a reader can change."""

import base64
import html
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import ipywidgets as ui
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from helpers import figures
from helpers.explorer import widgets
from helpers.explorer.explorer import END, ROLES, Explorer, Plane, Setting, Told, View
from helpers.figures import COLOURS, LABELS
from helpers.lm.activations import POSITIONS
from helpers.lm.architecture import FINAL

DOSES = (-3.0, 3.0, 0.25)  # the slider's smallest and largest value and its step
FULL_COLOUR = 3.0  # nats: a token whose log-probability changed by as much has the strongest colour
SHOWN_TOKENS = 8
KEPT = 200  # pages
GREY = "#555555"  # of what is said about an answer
ROW, LINE, LETTERS = 0.62, 0.17, 60  # of the sheet: a row of one line and each further line, inches; letters in a line
NAMES = {"base": "base", "steered": "base + λv", "desteered": "DPO − λv", "dpo": "DPO"}

# --- Pictures ---


def draw_next_token(axes: Axes, view: View, explorer: Explorer) -> None:
    """The likeliest next tokens, without the dose (small) and with it (large), for the base and the DPO model."""
    told = view.told
    likeliest = np.max([told[role].next_token for role in ROLES], axis=0).argsort()[::-1][:SHOWN_TOKENS]
    names = [figures.token_label(explorer.token(int(i))) for i in likeliest]
    y = np.arange(len(likeliest))
    for before, after, offset in (("base", "steered", -0.16), ("dpo", "desteered", 0.16)):
        start, end = (told[role].next_token[likeliest] for role in (before, after))
        axes.hlines(y + offset, start, end, color=COLOURS[after], lw=1.2, alpha=0.6)
        axes.scatter(start, y + offset, s=16, color=COLOURS[before], label=LABELS[before], zorder=3)
        axes.scatter(end, y + offset, s=34, marker="D", color=COLOURS[after], label=_label(after), zorder=3)
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    axes.set(xlabel="probability of the next token", xlim=(-0.03, 1.03))


def draw_plane(axes: Axes, plane: Plane, views: Sequence[View]) -> None:
    """Where the final state goes over the doses of some views, over the clouds of the held-out prompts."""
    for role in ("base", "dpo"):
        axes.scatter(*plane.clouds[role].T, s=6, color=COLOURS[role], alpha=0.25, linewidths=0)
    for before, after in (("base", "steered"), ("dpo", "desteered")):
        start = plane.at(views[0].told[before].state)
        path = np.array([plane.at(view.told[after].state) for view in views])
        axes.plot(*np.vstack([start[None], path] if len(path) == 1 else [path]).T, color=COLOURS[after], lw=1.2)
        axes.scatter(*path.T, s=34, marker="D", color=COLOURS[after], zorder=3)
        axes.scatter(*start, s=30, color=COLOURS[before], edgecolor="white", zorder=4)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, plane.reach[0]), max(high, plane.reach[1]))  # the same for every dose
    axes.set(xlabel="final state along $v^*$", ylabel="across: first PC of base")


def _label(role: str) -> str:
    return LABELS[role].replace("v^*", "v")  # whichever direction was chosen


def _colour(change: float) -> tuple[str, float]:
    """A token's colour, blue for a promoted and orange for a suppressed one, and how much of it."""
    return COLOURS["dpo" if change > 0 else "steered"], 0.55 * min(1.0, abs(change) / FULL_COLOUR)


def write_tokens(axes: Axes, told: Told, y: float, left: float, right: float, step: float) -> float:
    """Write an answer between two x, its tokens coloured by their changes, from y downwards; return where it ends.
    All in axes' coordinates, the axes 1 wide and 1 high; step: from line to line."""
    renderer, x = axes.figure.canvas.get_renderer(), left
    style = {"transform": axes.transAxes, "fontsize": 8, "va": "baseline", "parse_math": False}
    box = {"boxstyle": "square,pad=0.12", "linewidth": 0, "edgecolor": "none"}
    shown = [figures.drawable(token.replace("\n", " ")) for token in told.tokens]
    texts = [axes.text(left, y, token, **style) for token in shown]
    whole = axes.get_window_extent(renderer).width
    widths = [_advance(text, renderer) / whole for text in texts]
    ends = [token[-1:].isspace() for token in told.tokens]
    starts = [i for i, token in enumerate(told.tokens) if token[:1].isspace() or (i and ends[i - 1])]  # of words
    for i, (text, change) in enumerate(zip(texts, told.changes)):
        if i in starts and x + sum(widths[i : min((j for j in starts if j > i), default=None)]) > right:
            x, y = left, y - step
        text.set_position((x, y))
        text.set_bbox(box | {"facecolor": _colour(change)})
        x += widths[i]
    return y - step


def _advance(text: Text, renderer) -> float:
    """How far a text moves the pen, in pixels; the extent of its ink leaves out a space at its end."""
    extent = partial(renderer.get_text_width_height_descent, prop=text.get_fontproperties(), ismath=False)
    return extent(text.get_text() + "|")[0] - extent("|")[0]


def sheet(explorer: Explorer, views: Sequence[View]) -> Figure:
    """The static picture: what steered base and steered DPO say at some doses, and where that takes the last prompt.
    views: of one setting at several doses. The next-token panel is about the last of them."""
    rows = _row(views) * len(views) + 0.3
    figure, panels = plt.subplot_mosaic(
        [["text", "text"], ["next", "plane"]], figsize=(figures.WIDTH * 1.25, rows + 3.1), height_ratios=[rows, 3.1]
    )
    panels["text"].axis("off")
    draw_next_token(panels["next"], views[-1], explorer)
    panels["next"].set_title(rf"next token at $\lambda$ = {_number(views[-1].setting.dose)}")
    panels["next"].legend(loc="lower right", fontsize=8)
    draw_plane(panels["plane"], explorer.plane, views)
    doses = ", ".join(_number(view.setting.dose) for view in views)
    panels["plane"].set_title(rf"states at $\lambda$ = {doses}")
    figure.canvas.draw()  # lays the panels out, so that text can be measured
    figure.set_layout_engine("none")
    _write_answers(panels["text"], views)
    return figure


def _row(views: Sequence[View]) -> float:
    """The height of a row, inches: room for the longest answer."""
    longest = max(len(view.told[role].text) for view in views for role in ("steered", "desteered"))
    return ROW + LINE * ((max(longest, 1) - 1) // LETTERS)


def _number(dose: float) -> str:
    return f"{dose:g}".replace("-", "−")


def _write_answers(axes: Axes, views: Sequence[View]) -> None:
    """A row a dose: base + lambda v on the left, DPO - lambda v on the right, with their judgements."""
    columns = {"steered": (0.06, 0.51), "desteered": (0.55, 1.0)}
    row = 1 / (len(views) + 0.4)
    line = row * LINE / _row(views)
    write = {"transform": axes.transAxes}
    for i, name in enumerate([r"$\lambda$", *(_number(view.setting.dose) for view in views)]):
        axes.text(0, 1 - (i - 0.3 if i else 0.2) * row, name, **write)
    for role, (left, right) in columns.items():
        axes.text(left, 1 - 0.2 * row, _label(role), color=COLOURS[role], **write)
        for i, view in enumerate(views):
            top = 1 - (0.4 + i) * row - 1.1 * line
            below = write_tokens(axes, view.told[role], top, left, right, line)
            axes.text(left, below, _said(view.told[role].judgements), fontsize=7, color=GREY, **write)


def _said(judgements: dict[str, str]) -> str:
    return " · ".join(f"{name}: {value}" for name, value in judgements.items())


# --- The page ---


def page(explorer: Explorer, view: View) -> str:
    """A view as HTML: the four answers, their colours' key, the next-token distribution and the plane."""
    answers = "".join(_answer(role, told) for role, told in view.told.items())
    pictures = "".join(
        f'<img style="width: 100%; max-width: 480px" alt="{alt}" src="data:image/png;base64,{_picture(draw)}">'
        for alt, draw in (
            ("Probabilities of the likeliest next tokens, without and with the dose",
             lambda axes: (draw_next_token(axes, view, explorer), axes.legend(loc="best", fontsize=8))),
            ("The final state before and after the dose, over the clouds of Figure 1c",
             lambda axes: draw_plane(axes, explorer.plane, [view])),
        )
    )  # fmt: skip
    return (
        f'<div data-dose="{view.setting.dose:g}" style="{widgets.PAPER}">'
        f'<div style="{widgets.GRID.format("165px")}">{answers}</div>'
        f'<p style="margin: 8px 0">{_key()}</p><div style="{widgets.GRID.format("300px")}">{pictures}</div></div>'
    )


def _answer(role: str, told: Told) -> str:
    tokens = "".join(
        f'<span title="{change:+.2f} nats" style="{_style(change)}">{html.escape(token)}</span>'
        for token, change in zip(told.tokens, told.changes)
    )
    judged = f'<div style="color: {GREY}; font-size: 12px">{html.escape(_said(told.judgements))}</div>'
    return widgets.answer(role, NAMES[role], tokens, judged)


def _style(change: float) -> str:
    colour, alpha = _colour(change)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    lowered = "; text-decoration: underline dotted" if change < -0.5 else ""  # told from raised in greyscale too
    return f"background: rgba({red}, {green}, {blue}, {alpha:.2f}){lowered}"


def _key() -> str:
    samples = "".join(
        f'<span style="{_style(change)}">&nbsp;{change:+g}&nbsp;</span> '
        for change in (-FULL_COLOUR, -1.0, 1.0, FULL_COLOUR)
    )
    return (
        f"Colour: how much the dose changes a token's log-probability in the same model (nats): {samples} "
        f"underlined where it falls by more than 0.5. {END} ends the answer."
    )


def _picture(draw: Callable[[Axes], object]) -> str:
    figure, axes = plt.subplots(figsize=(figures.WIDTH * 0.62, 2.9))
    draw(axes)
    return base64.b64encode(widgets.png(figure)).decode()


# --- The panel ---


def panel(explorer: Explorer, start: Setting, prompts: Sequence[str]) -> ui.VBox:
    """Controls for every part of a setting, a line that says what is being done, and the page of the setting chosen.

    prompts: those to pick from. Made inside a running event loop, such as the kernel's, it starts on `start` at once.
    """
    c = controls(explorer, start, prompts)
    line, say = widgets.status()
    shown = ui.HTML()
    pages: dict[Setting, str] = {}

    def work(setting: Setting) -> Iterator[str]:
        if setting not in pages:
            view = yield from explorer.look(setting)
            yield "Drawing …"
            while len(pages) >= KEPT:
                del pages[next(iter(pages))]
            pages[setting] = page(explorer, view)
        shown.value = pages[setting]

    latest = widgets.Latest(work, say)

    def chosen() -> Setting:
        seed = c["seed"].value if c["sample"].value else None
        dose = round(c["dose"].value, 6)  # steps add up to 1.2500000000000009
        return Setting(*(c[name].value for name in ("prompt", "site", "position", "direction")), dose, seed)

    ui.dlink((c["pick"], "value"), (c["prompt"], "value"), lambda picked: picked or c["prompt"].value)
    for name in ("prompt", "site", "position", "direction", "dose", "sample", "seed"):
        c[name].observe(lambda _: latest(chosen()), "value")
    latest(start)
    rows = (("pick", "prompt"), ("site", "position", "direction"), ("dose",), ("sample", "seed"))
    lay = {"display": "flex", "flex_flow": "row wrap"}
    return ui.VBox([*(ui.Box([c[name] for name in row], layout=lay) for row in rows), line, shown])


def controls(explorer: Explorer, start: Setting, prompts: Sequence[str]) -> dict[str, ui.Widget]:
    """One control for each part of a setting, at `start`."""
    low, high, step = DOSES
    wide, narrow = {"flex": "1 1 360px", "max_width": "640px"}, {"flex": "1 1 220px", "max_width": "320px"}
    options = [("a held-out prompt …", ""), *zip(prompts, prompts)]
    names = list(explorer.directions(FINAL, start.position))
    return {
        "pick": ui.Dropdown(options=options, value="", description="pick", layout=wide),
        "prompt": ui.Text(start.prompt, description="or type", continuous_update=False, layout=wide),
        "site": ui.Dropdown(options=explorer.sites, value=start.site, description="site", layout=narrow),
        "position": ui.Dropdown(options=POSITIONS, value=start.position, description="position", layout=narrow),
        "direction": ui.Dropdown(options=names, value=start.direction, description="direction v", layout=narrow),
        "dose": ui.FloatSlider(start.dose, min=low, max=high, step=step, description="dose λ", readout_format="+.2f",
                               layout={**wide, "max_width": "960px"}),
        "sample": ui.Checkbox(start.seed is not None, description="sample (else greedy)", indent=False,
                              layout=narrow),
        "seed": ui.BoundedIntText(start.seed or 0, min=0, max=10**6, description="seed", layout=narrow),
    }  # fmt: skip
