"""An executed notebook as one page: what a reader sees of it is all in there, and nothing of it is elsewhere."""

import base64
import re

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.explorer import widgets
from helpers.places import PROJECT
from tools import page

DOT = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
ROLES = {"base": "base", "DPO": "dpo"}


@pytest.fixture
def answers():
    rows = [("Who?", 0.0, "He.", "He."), ("Who?", 1.0, "He.", "<b>She & I</b>"), ("Who?", 2.0, "He.", "They.")]
    return pd.DataFrame(rows, columns=["prompt", "dose", *ROLES])


@pytest.fixture
def written(tmp_path, answers):
    shown = [
        new_output("display_data", {"image/png": DOT}),
        new_output("display_data", {"text/html": widgets.dosed(answers, ROLES).data}),
        new_output("display_data", {"text/html": pd.DataFrame({"value": [0.25]}, ["of KL, v*"]).to_html()}),
    ]
    cells = [
        new_markdown_cell("# One page: what?\n\n**Question.** Which?"),
        new_code_cell("secret = 1", outputs=shown),
        new_markdown_cell("## The rest\n\nv\\* is one."),
    ]
    path = tmp_path / "one.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return page.page(path)


def test_it_shows_outputs_and_text_and_no_code(written):
    assert "<title>One page: what?</title>" in written and "<h1>One page: what?</h1>" in written
    assert "The rest" in written and "v* is one." in written and "of KL, v*" in written and f"base64,{DOT}" in written
    assert "secret" not in written and "Question." not in written


def test_it_asks_for_nothing_from_elsewhere(written):
    named = re.findall(r'(?:src|href)="([^"]*)"', written)
    assert named and all(name.startswith(("data:", "#")) for name in named)
    assert not re.search(r"https?://|@import|url\(", written)


def test_one_dose_is_shown_until_the_slider_is_moved(written):
    parts = re.findall(r'<div data-dose="([\d.]+)"( hidden)?(?:="")?>', written)
    assert parts == [("0", " hidden"), ("1", ""), ("2", " hidden")]
    (slider,) = re.findall(r"<input [^>]*>", written)
    assert all(word in slider for word in ('type="range"', 'min="0"', 'max="2"', 'value="1"'))


def test_what_a_model_says_is_text_and_no_markup(written):
    assert "&lt;b&gt;She &amp; I&lt;/b&gt;" in written and "<b>She" not in written


def test_the_same_answers_give_the_same_bytes(answers):
    assert widgets.dosed(answers, ROLES).data == widgets.dosed(answers.copy(), ROLES).data


@pytest.mark.parametrize("at", ["notebooks/one_page.ipynb", "figures/smollm2/pages/one_page.ipynb"])
def test_a_page_that_is_kept_is_that_of_its_notebook(at):
    beside = "figures/atlas" if at.startswith("notebooks") else "figures/smollm2"
    assert (PROJECT / beside / "report.html").read_text() == page.page(PROJECT / at)
