"""What a reader does with the one page: open the file, wide or narrow, and move the slider to another dose."""

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.explorer import widgets
from helpers.places import PROJECT
from tools import page

ROLES = {"base": "base", "base + λv*": "steered", "DPO − λv*": "desteered", "DPO": "dpo"}


@pytest.fixture
def file(tmp_path):
    said = {name: f"What {name} says, in some more words than fit in a narrow column." for name in ROLES}
    rows = [{"prompt": "Who?", "dose": dose} | said | {"base + λv*": f"dose {dose}"} for dose in (0.0, 1.0, 2.0)]
    shown = new_output("display_data", {"text/html": widgets.dosed(pd.DataFrame(rows), ROLES).data})
    cells = [new_markdown_cell("# One page: what?"), new_code_cell("", outputs=[shown])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "one.ipynb")
    path = tmp_path / "one.html"
    path.write_text(page.page(tmp_path / "one.ipynb"), encoding="utf-8")
    return path


@pytest.fixture(params=[1200, 360])
def opened(request, browser):
    """`opened(path)`: a page of a file at a width. Afterwards it fits, and has neither failed nor asked for more."""
    page, errors, asked = browser.new_page(viewport={"width": request.param, "height": 800}), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    def opened(path):
        page.goto(path.as_uri())
        return page

    yield opened
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param
    assert (
        errors == [] and len([url for url in asked if not url.startswith("data:")]) == 1
    )  # the file; pictures are in it
    page.close()


def test_the_slider_shows_the_answers_of_its_dose_without_a_kernel(opened, file):
    page = opened(file)
    slider, visible = page.locator("input[type=range]"), page.locator("[data-dose]:visible")
    assert visible.count() == 1 and "dose 1" in visible.text_content()
    for key, dose in (("ArrowRight", "2"), ("ArrowLeft", "1"), ("ArrowLeft", "0")):
        slider.press(key)
        assert visible.count() == 1 and visible.get_attribute("data-dose") == dose
        assert f"dose {dose}" in visible.text_content() and page.locator("label b").text_content() == dose


@pytest.mark.parametrize("name", ["atlas", "smollm2"])
def test_a_page_that_is_kept_shows_the_next_dose(opened, name):
    page = opened(PROJECT / "figures" / name / "report.html")
    visible = page.locator("[data-dose]:visible")
    assert visible.get_attribute("data-dose") == "1"
    page.locator("input[type=range]").press("ArrowRight")
    assert visible.count() == 1 and visible.get_attribute("data-dose") == "1.5"
