"""Interactive views that draw a static picture first: what a page without a kernel shows is never a broken widget."""

import asyncio
import hashlib
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import product

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure

from helpers import figures

PAUSE = 0.01  # seconds in which the kernel takes the moves that have arrived meanwhile


def is_live() -> bool:
    """Whether a person sits at the front end that runs this cell.
    Each request to run a cell says whether its sender can answer a question (`allow_stdin`). JupyterLab can; nbclient,
    and with it papermill, nbmake and nbconvert, cannot, and nobody would see a slider there."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and kernel.get_parent("shell").get("content", {}).get("allow_stdin", False)


def png(figure: Figure) -> bytes:
    """A figure as a PNG, and no longer open."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=figure.dpi, metadata={"Software": None})
    plt.close(figure)
    return drawn.getvalue()


class Latest:
    """Runs the latest request alone: each cancels the one before it, where that has not finished.

    work: a generator function. It yields what it is about to do, as text; the kernel takes new requests then, and a
    cancelled one goes no further. What it raises is said in one sentence, never shown as a traceback.
    say: is given each text, and an empty one at the end.
    """

    def __init__(self, work: Callable[..., Iterator[str]], say: Callable[[str], None]):
        self.work, self.say = work, say
        self.task: asyncio.Task | None = None

    def __call__(self, *request) -> asyncio.Task:
        """Start on a request, inside a running event loop such as the kernel's."""
        if self.task is not None:
            self.task.cancel()
        self.task = asyncio.get_running_loop().create_task(self._run(request))
        return self.task

    async def _run(self, request: tuple) -> None:
        await asyncio.sleep(PAUSE)  # a dragged slider sends many: all but the last end here
        try:
            with closing(self.work(*request)) as steps:
                for doing in steps:
                    self.say(doing)
                    await asyncio.sleep(PAUSE)
            self.say("")
        except ValueError as error:  # of what the reader asked for, in a sentence of its own
            self.say(str(error))
        except Exception as error:  # a task's traceback would be seen by nobody
            self.say(f"This failed with {type(error).__name__}: {error}")


def status() -> tuple[ipywidgets.HTML, Callable[[str], None]]:
    """A line that tells what is being done, read out by screen readers too, and the function that writes it."""
    line = ipywidgets.HTML()

    def say(text: str) -> None:
        line.value = f'<span role="status" aria-live="polite">{html.escape(text) or "&nbsp;"}</span>'

    say("")
    return line, say


def explore(draw: Callable[..., Figure], grid: Mapping[str, Sequence], start: Mapping | None = None) -> None:
    """Show `draw(**values)` for one point of a grid and, in a live front end, a slider a name to move to any other.

    grid: {argument: its values}. start: the values drawn first, by default the first of each. The picture is an
    ordinary output, changed in place. The other points are drawn before their sliders can be moved, so that a move only
    fetches a picture; where `draw` raises ValueError its sentence is shown. Raises ValueError for a name without values
    and for a start that is not on the grid.
    """
    start = {name: values[0] if len(values) else None for name, values in grid.items()} | dict(start or {})
    for name, value in start.items():
        if value not in grid.get(name, ()):
            raise ValueError(f"explore cannot start at {name} = {value!r}: the grid has {list(grid.get(name, ()))}.")
    first = tuple(start[name] for name in grid)
    drawn: dict[tuple, bytes | ValueError] = {first: png(draw(**start))}
    picture = display(Image(drawn[first]), display_id=True)
    if not is_live():
        return
    line, say = status()
    controls = [_control(name, values, start[name]) for name, values in grid.items()]
    display(ipywidgets.VBox([*controls, line]))
    points = list(product(*grid.values()))
    for i, point in enumerate(points):
        say(f"Drawing {i + 1} of {len(points)} …")
        if point not in drawn:
            drawn[point] = _drawn(draw, dict(zip(grid, point)))

    def turn(_) -> None:
        found = drawn[tuple(control.value for control in controls)]
        if isinstance(found, bytes):
            picture.update(Image(found))
        say("" if isinstance(found, bytes) else str(found))

    for control in controls:
        control.observe(turn, "value")
        control.disabled = False
    say("")


def _drawn(draw: Callable[..., Figure], values: Mapping) -> bytes | ValueError:
    """The picture at some values, or why there is none."""
    try:
        return png(draw(**values))
    except ValueError as error:
        return error


def _control(name: str, values: Sequence, value) -> ipywidgets.Widget:
    """A slider over the values or, where there are no more than two, a button each; not to be moved yet."""
    options = [(f"{v:g}" if isinstance(v, float) else str(v), v) for v in values]
    kind = ipywidgets.SelectionSlider if len(options) > 2 else ipywidgets.ToggleButtons
    return kind(options=options, value=value, description=name, disabled=True)


# --- Answers as HTML, and a slider that needs no kernel ---

PAPER = (
    "font: 13px/1.6 'DejaVu Sans', Verdana, sans-serif; background: white; color: #222; padding: 8px; max-width: 1100px"
)
SAID = "white-space: pre-wrap; overflow-wrap: anywhere"
GRID = "display: grid; gap: 10px 16px; grid-template-columns: repeat(auto-fit, minmax({}, 1fr));"


def answer(role: str, name: str, said: str, below: str = "") -> str:
    """What a model in a role of figures.COLOURS says, `said` and what stands `below` it as HTML."""
    return (
        f'<div data-role="{role}" style="border-top: 3px solid {figures.COLOURS[role]}; padding-top: 4px">'
        f'<b>{html.escape(name)}</b><div class="said" style="{SAID}">{said}</div>'
        f"{below}</div>"
    )


def dosed(answers: pd.DataFrame, roles: Mapping[str, str], start: float = 1.0) -> HTML:
    """Answers at several doses under a slider that works in any page; without scripts, those at dose `start` are shown.

    answers: a row a `prompt` and a `dose`, and a column for each of `roles`, {column: what figures.COLOURS calls it}.
    """
    doses = sorted(answers["dose"].unique())
    parts = "".join(
        f'<div data-dose="{dose:g}"{"" if dose == start else " hidden"}>'
        + "".join(_asked(row, roles) for _, row in answers[answers["dose"] == dose].iterrows())
        + "</div>"
        for dose in doses
    )
    name = f"doses-{hashlib.sha256(parts.encode()).hexdigest()[:8]}"
    return HTML(
        f'<div id="{name}" style="{PAPER}"><label>dose λ <input type="range" aria-label="dose" style="width: 240px" '
        f'min="0" max="{len(doses) - 1}" value="{doses.index(start)}"> <b>{start:g}</b></label>{parts}</div>'
        f'<script>{{ const box = document.getElementById("{name}");\n{_TURN} }}</script>'
    )


_TURN = """box.querySelector("input").oninput = event => box.querySelectorAll("[data-dose]").forEach((part, i) => {
part.hidden = i != event.target.value;
if (!part.hidden) box.querySelector("b").textContent = part.dataset.dose; });"""


def _asked(row: pd.Series, roles: Mapping[str, str]) -> str:
    """A prompt and what each model answers to it."""
    said = "".join(answer(role, name, html.escape(row[name])) for name, role in roles.items())
    prompt = html.escape(row["prompt"])
    return f'<p style="margin: 10px 0 4px"><i>{prompt}</i></p><div style="{GRID.format("165px")}">{said}</div>'
