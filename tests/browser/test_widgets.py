"""What a reader does in JupyterLab: run a notebook, move a slider, see text and pictures change, and no error."""

import pytest

from helpers import places

PANEL, ANSWER, SLIDER = "[data-dose]", "[data-role=steered] .said", ".widget-slider .noUi-handle"
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
PICTURES = places.PROJECT / "build" / "browser"


def drawn(cell) -> list[str]:
    return cell.locator("img").evaluate_all("images => images.map(image => image.src)")


def outputs(cell) -> int:
    return cell.locator(".jp-OutputArea-child").count()


def press(cell, key: str, times: int) -> None:
    """Move a cell's slider by its keys, as one does without a mouse."""
    for _ in range(times):
        cell.locator(SLIDER).first.press(key)


@pytest.fixture
def explorer(run_all):
    """The page of notebook 09, the cell that holds the panel, and the page's errors."""
    page, errors = run_all("09_explorer", PANEL)
    return page, page.locator(".jp-Cell", has=page.locator(PANEL)), errors


def test_a_moved_dose_changes_text_and_plots_in_place_and_leaves_no_error(explorer):
    page, cell, errors = explorer
    cell.locator("[data-dose='1']").wait_for()
    said, shown, places = cell.locator(ANSWER).text_content(), drawn(cell), outputs(cell)
    press(cell, "ArrowRight", 40)  # more than there are steps to the largest dose
    cell.locator("[data-dose='3']").wait_for()
    assert cell.locator(ANSWER).text_content() != said
    assert all(before != after for before, after in zip(shown, drawn(cell), strict=True))
    press(cell, "ArrowLeft", 8)
    cell.locator("[data-dose='1']").wait_for()
    assert cell.locator(ANSWER).text_content() == said and drawn(cell) == shown
    assert outputs(cell) == places
    assert page.locator(ERRORS).count() == 0 and errors == []


def test_a_bad_prompt_gets_a_sentence_and_the_next_one_an_answer(explorer):
    page, cell, errors = explorer
    prompt, said = cell.get_by_label("or type"), cell.locator(ANSWER).text_content()
    for text, sentence in (("", "The prompt is empty"), ("what " * 300, "The prompt has")):
        prompt.fill(text)
        prompt.press("Enter")
        cell.get_by_role("status").get_by_text(sentence).wait_for()
    cell.get_by_label("pick").select_option(index=4)  # another than the first that differs
    page.wait_for_function("([cell, said]) => cell.querySelector('[data-role=steered] .said').textContent !== said",
                           arg=[cell.element_handle(), said])  # fmt: skip
    page.wait_for_function("cell => cell.querySelector('[role=status]').textContent.trim() === ''",
                           arg=cell.element_handle())  # fmt: skip
    assert page.locator(ERRORS).count() == 0 and errors == []


@pytest.mark.parametrize("width", [1280, 800])
def test_the_panel_fits_its_page(explorer, width):
    """A picture of it is left in build/browser/."""
    page, cell, _ = explorer
    page.set_viewport_size({"width": width, "height": 1000})
    cell.locator(PANEL).evaluate("shown => shown.scrollIntoView({block: 'end'})")
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"explorer_{width}.png")
    for part in (PANEL, ".widget-vbox"):
        inner, outer = cell.locator(part).first.evaluate("shown => [shown.scrollWidth, shown.clientWidth]")
        assert inner <= outer + 1, part
    assert cell.locator(ANSWER).evaluate("shown => parseFloat(getComputedStyle(shown).fontSize)") >= 12


def test_a_figure_of_notebook_03_turns_in_place(run_all):
    page, errors = run_all("03_steering_vector", SLIDER)
    cell = page.locator(".jp-Cell", has=page.locator(SLIDER))
    (shown,), places = drawn(cell), outputs(cell)
    press(cell, "ArrowRight", 1)
    page.wait_for_function("([cell, shown]) => cell.querySelector('img').src !== shown",
                           arg=[cell.element_handle(), shown])  # fmt: skip
    press(cell, "ArrowLeft", 1)
    page.wait_for_function("([cell, shown]) => cell.querySelector('img').src === shown",
                           arg=[cell.element_handle(), shown])  # fmt: skip
    assert outputs(cell) == places == 2
    assert page.locator(ERRORS).count() == 0 and errors == []
