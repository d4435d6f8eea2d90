"""The static picture comes first and alone without a front end; later moves cancel earlier ones; nothing piles up."""

import asyncio
import struct
from itertools import product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
from jupyter_client.manager import start_new_kernel

from helpers.explorer import widgets


def draw(width=2, height=1.0):
    return plt.figure(figsize=(width, height), dpi=50)


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the PNG's own header."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


@pytest.fixture
def page(monkeypatch):
    """What a notebook's page holds: its outputs, one of which may be replaced in place."""
    outputs = []

    def display(output, display_id=False):
        outputs.append(output)
        place = len(outputs) - 1
        return SimpleNamespace(update=lambda new: outputs.__setitem__(place, new))

    monkeypatch.setattr(widgets, "display", display)
    return outputs


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setattr(widgets, "is_live", lambda: True)


# --- Is there a front end? ---


def test_a_plain_python_is_not_live():
    assert not widgets.is_live()


def test_a_kernel_is_live_where_the_sender_of_its_cell_can_answer_a_question():
    """nbclient, and with it papermill and nbmake, says that it cannot (the next test); JupyterLab says that it can."""
    manager, client = start_new_kernel()
    try:
        said = []
        for can_answer in (True, False):
            client.execute_interactive(
                "from helpers.explorer import widgets; print(widgets.is_live())", allow_stdin=can_answer, timeout=60,
                stdin_hook=lambda _: None,
                output_hook=lambda m: said.append(m["content"]["text"].strip()) if m["msg_type"] == "stream" else None,
            )  # fmt: skip
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert said == ["True", "False"]


# --- explore ---


def test_without_a_front_end_there_is_one_picture_and_nothing_else(page):
    widgets.explore(draw, {"width": [2, 3, 4], "height": [1.0, 2.0]})
    (picture,) = page
    assert size(picture.data) == (100, 50)
    assert plt.get_fignums() == []


def test_a_start_is_what_is_drawn_first(page):
    widgets.explore(draw, {"width": [2, 3, 4], "height": [1.0, 2.0]}, start={"width": 4})
    assert size(page[0].data) == (200, 50)


@pytest.mark.parametrize(
    "grid, start, says",
    [
        ({"width": []}, None, r"explore cannot start at width = None: the grid has \[\]"),
        ({"width": [2, 3]}, {"width": 5}, r"explore cannot start at width = 5: the grid has \[2, 3\]"),
        ({"width": [2, 3]}, {"depth": 5}, "explore cannot start at depth = 5"),
    ],
)
def test_a_start_off_the_grid_is_refused(page, grid, start, says):
    with pytest.raises(ValueError, match=says):
        widgets.explore(draw, grid, start)
    assert page == []


def test_all_is_drawn_once_before_a_slider_can_be_moved_and_a_move_draws_nothing(page, live):
    calls, said = [], []

    def counted(**values):
        controls = [control for box in page[1:] for control in box.children[:-1]]
        said.extend(box.children[-1].value for box in page[1:])
        calls.append((tuple(values.values()), [control.disabled for control in controls]))
        return draw(**values)

    widgets.explore(counted, {"width": [2, 3, 4], "height": [1.0, 2.0]})
    assert sorted(point for point, _ in calls) == list(product([2, 3, 4], [1.0, 2.0]))
    assert calls[0] == ((2, 1.0), []) and all(disabled == [True, True] for _, disabled in calls[1:])
    assert ">Drawing 2 of 6 …<" in said[0] and ">Drawing 6 of 6 …<" in said[-1]
    width, height, line = page[1].children
    assert (width.disabled, height.disabled) == (False, False) and ">&nbsp;<" in line.value
    seen = []
    for control, value in ((width, 4), (height, 2.0), (width, 2), (width, 4)):
        control.value = value
        seen.append(size(page[0].data))
    assert seen == [(200, 50), (200, 100), (100, 100), (200, 100)]
    assert len(page) == 2 and len(calls) == 6 and plt.get_fignums() == []


def test_what_cannot_be_drawn_is_said_in_a_sentence_and_the_picture_stays(page, live):
    def fragile(width):
        if width == 3:
            raise ValueError("There is no <width> 3.")
        return draw(width)

    widgets.explore(fragile, {"width": [2, 3, 4]})
    slider, line = page[1].children
    slider.value = 3
    assert "There is no &lt;width&gt; 3." in line.value and size(page[0].data) == (100, 50)
    slider.value = 4
    assert "There is no" not in line.value and size(page[0].data) == (200, 50)


def test_three_values_make_a_slider_and_two_a_button_each(page, live):
    widgets.explore(draw, {"width": [2, 3, 4], "height": [1.0, 2.5]})
    slider, buttons, _ = page[1].children
    assert (type(slider).__name__, type(buttons).__name__) == ("SelectionSlider", "ToggleButtons")
    assert [label for label, _ in buttons.options] == ["1", "2.5"] and buttons.description == "height"


# --- Latest ---


def run(work, *requests, pause=0.0):
    """What is said, for requests with a pause after each."""
    said = []

    async def send():
        latest = widgets.Latest(work, said.append)
        for request in requests:
            latest(request)
            await asyncio.sleep(pause)
        await latest.task

    asyncio.run(send())
    return said


def test_of_requests_that_come_at_once_only_the_last_is_begun():
    begun = []

    def work(request):
        begun.append(request)
        yield f"doing {request}"

    assert run(work, 1, 2, 3) == ["doing 3", ""] and begun == [3]


def test_a_request_cancels_one_that_is_under_way_between_two_steps_and_closes_it():
    steps, closed = [], []

    def work(request):
        try:
            for step in range(1000 if request == "long" else 2):
                steps.append((request, step))
                yield "working"
        finally:
            closed.append(request)

    said = run(work, "long", "short", pause=5 * widgets.PAUSE)
    assert ("long", 0) in steps and ("long", 999) not in steps
    assert steps[-2:] == [("short", 0), ("short", 1)] and closed == ["long", "short"] and said[-1] == ""


@pytest.mark.parametrize(
    "error, says",
    [(ValueError("The prompt is empty."), "The prompt is empty."), (KeyError("x"), "This failed with KeyError: 'x'")],
)
def test_an_error_is_said_and_does_not_stop_later_requests(error, says):
    def work(request):
        yield "working"
        if request == "bad":
            raise error

    assert run(work, "bad", "good", pause=10 * widgets.PAUSE) == ["working", says, "working", ""]
