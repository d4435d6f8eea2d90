"""What a reader does with the one page: open the file, wide or narrow, and move the slider to another dose."""

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers import widgets
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


@pytest.mark.parametrize("width", [1200, 360])
def test_the_slider_shows_the_answers_of_its_dose_without_a_kernel(browser, file, width):
    opened, errors, asked = browser.new_page(viewport={"width": width, "height": 800}), [], []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(file.as_uri())
    slider, visible = opened.locator("input[type=range]"), opened.locator("[data-dose]:visible")
    assert visible.count() == 1 and "dose 1" in visible.text_content()
    for key, dose in (("ArrowRight", "2"), ("ArrowLeft", "1"), ("ArrowLeft", "0")):
        slider.press(key)
        assert visible.count() == 1 and visible.get_attribute("data-dose") == dose
        assert f"dose {dose}" in visible.text_content() and opened.locator("label b").text_content() == dose
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == [] and asked == [file.as_uri()]
    opened.close()


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("path", sorted(PROJECT.glob("figures/*/report.html")), ids=lambda path: path.parent.name)
def test_the_pages_that_are_kept_fit_and_ask_for_nothing(browser, path, width):
    opened, errors, asked = browser.new_page(viewport={"width": width, "height": 800}), [], []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(path.as_uri())
    slider, visible = opened.locator("input[type=range]"), opened.locator("[data-dose]:visible")
    assert visible.get_attribute("data-dose") == "1"
    slider.press("ArrowRight")
    assert visible.count() == 1 and visible.get_attribute("data-dose") == "1.5"
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    own = [url for url in asked if not url.startswith("data:")]  # the pictures within
    assert errors == [] and own == [path.as_uri()]
    opened.close()
