"""Figures are byte-stable and come with the numbers they draw, in JSON that any reader takes."""

import io
import json
import struct
import warnings

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import claims, figures, places, profiles
from helpers.estimates import Estimate

ATLAS = profiles.load("atlas")
COMMITTED = sorted(p for p in (places.PROJECT / "figures").glob("*/*.json") if p.name != "claims.json")
NUMBERS = {
    "x": np.arange(3),
    "y": [0.1, 1 / 3],
    "n": np.int64(4),
    "tensor": torch.ones(2, 1),
    "none": None,
    "name": "v*",
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def write_notebook(folder, name, *sources):
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), folder / f"{name}.ipynb")


def saves(name):
    return f"x = 1\nfigures.save_figure(\n    figure, s.profile, {name!r}, 'See here.', [], {{}}\n)"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where figures go, and a notebook that saves three of them."""
    write_notebook(tmp_path / "notebooks", "03_steering_vector", saves("fig"), saves("one") + "\n" + saves("two"))
    monkeypatch.setattr(figures, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("DSTEER_FIGURES", str(tmp_path / "drawn"))
    return tmp_path / "drawn"


def save(name="fig", numbers=NUMBERS, caption="What to\n  see.", profile=ATLAS):
    figures.use_style()
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.plot([0, 1, 2], [1, 0, 1], color=figures.COLOURS["dpo"], label=figures.LABELS["steered"])
    figures.band(axes, [0, 1, 2], [0.5, 0, 0.5], [1.5, 1, 1.5], "dpo")
    axes.legend()
    figures.save_figure(figure, profile, name, caption, ["C5"], numbers)


def read(path):
    """Strict JSON: no NaN, no Infinity."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def chunks(path):
    """The types of a PNG's chunks, in order."""
    data, at, found = path.read_bytes(), 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found.append(data[at + 4 : at + 8].decode())
        at += 12 + length
    return found


def test_drawing_again_gives_the_same_bytes(root):
    save()
    first = {p.name: p.read_bytes() for p in (root / "atlas").iterdir()}
    save()
    assert {p.name: p.read_bytes() for p in (root / "atlas").iterdir()} == first
    assert sorted(first) == ["fig.json", "fig.png"]


def test_other_numbers_give_other_bytes(root):
    save("one")
    save("two", {"x": [1]})
    assert (root / "atlas" / "one.json").read_bytes() != (root / "atlas" / "two.json").read_bytes()


def test_the_order_in_which_numbers_are_given_says_nothing(root):
    save("one")
    save("two", dict(reversed(NUMBERS.items())))
    assert (root / "atlas" / "one.json").read_bytes() == (root / "atlas" / "two.json").read_bytes()


def test_the_png_holds_no_text_and_no_date(root):
    save()
    found = chunks(root / "atlas" / "fig.png")
    assert {"IHDR", "IDAT", "IEND"} <= set(found)
    assert not {"tEXt", "iTXt", "zTXt", "tIME"} & set(found)


def test_the_json_holds_caption_claims_notebook_and_numbers(root):
    save()
    assert read(root / "atlas" / "fig.json") == {
        "caption": "What to see.",
        "claims": ["C5"],
        "notebook": "03_steering_vector",
        "numbers": {
            "x": [0, 1, 2], "y": [0.1, 0.333333], "n": 4, "tensor": [[1.0], [1.0]], "none": None, "name": "v*",
        },
    }  # fmt: skip


def test_numbers_that_are_not_finite_become_null_wherever_they_stand(root):
    nan, inf = float("nan"), float("inf")
    save(
        numbers={"a": [1.0, nan, inf], "b": np.array([[nan, 2.0]]), "c": np.float64(nan), "d": {"e": -inf}, "f": (nan,)}
    )
    assert read(root / "atlas" / "fig.json")["numbers"] == {
        "a": [1.0, None, None], "b": [[None, 2.0]], "c": None, "d": {"e": None}, "f": [None],
    }  # fmt: skip


def test_the_last_bits_of_a_number_do_not_reach_the_file(root):
    save("one", {"plain": 0.1 + 0.2, "list": [0.1 + 0.2], "array": np.array([0.1 + 0.2])})
    save("two", {"plain": 0.3, "list": [0.3], "array": np.array([0.3])})
    assert (root / "atlas" / "one.json").read_bytes() == (root / "atlas" / "two.json").read_bytes()


def test_figures_go_below_the_folder_named_by_the_environment_or_into_the_project(root, monkeypatch):
    save(profile=ATLAS.replace(name="mine"))
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*.*")) == ["mine/fig.json", "mine/fig.png"]
    monkeypatch.delenv("DSTEER_FIGURES")
    assert figures.folder(ATLAS) == places.PROJECT / "figures" / "atlas"


# --- Which notebook ---


def test_a_figure_is_of_the_one_notebook_whose_code_saves_it_by_name(root, tmp_path):
    notebooks = tmp_path / "notebooks"
    write_notebook(notebooks, "04_other", "figures.save_figure(figure, s.profile, 'fig4', 'fig', [], {'one': 1})")
    assert figures.notebook_of("fig4") == "04_other"  # 'one' is a number's name there, 'fig' a caption
    assert figures.notebook_of("two") == "03_steering_vector"
    talk = new_notebook(cells=[new_markdown_cell(saves("two")), new_code_cell("name = 'two'\nprint('save_figure')")])
    nbformat.write(talk, notebooks / "05_talk.ipynb")
    assert figures.notebook_of("two") == "03_steering_vector"


def test_a_figure_that_no_notebook_saves_or_two_do_is_refused_and_not_written(root, tmp_path):
    with pytest.raises(ValueError, match=r"^No notebook of notebooks/ saves a figure called 'lost': one notebook must"):
        save("lost")
    assert not root.exists()
    write_notebook(tmp_path / "notebooks", "04_other", saves("two"))
    with pytest.raises(ValueError, match=r"^03_steering_vector, 04_other of notebooks/ saves a figure called 'two'"):
        save("two")


def test_a_notebook_that_was_changed_is_read_again(root, tmp_path):
    assert figures.notebook_of("fig") == "03_steering_vector"
    write_notebook(tmp_path / "notebooks", "03_steering_vector", saves("new"))
    assert figures.notebook_of("new") == "03_steering_vector"
    with pytest.raises(ValueError, match="'fig'"):
        figures.notebook_of("fig")


# --- Estimates, drawn ---

FOUND = [Estimate(0.5, 0.25, 0.6), Estimate(0.9, 0.9, 1.5, (0.8, 1.0))]


def pixels(draw):
    """A picture of what a function draws into axes, as bytes."""
    figures.use_style()
    figure, axes = plt.subplots(figsize=(3, 2))
    draw(axes)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, metadata={"Software": None})
    return drawn.getvalue()


def test_rows_are_points_with_horizontal_error_bars():
    value, reach, colour = np.array([0.5, 0.9]), [[0.25, 0.0], [0.1, 0.6]], figures.COLOURS["dpo"]
    by_hand = pixels(lambda axes: axes.errorbar(value, [3, 4], xerr=reach, fmt="o", ms=4, color=colour, label="x"))
    table = pd.DataFrame(FOUND)[["value", "low", "high"]]
    for given in (FOUND, table, table.to_numpy(), [one[:3] for one in FOUND]):
        assert pixels(lambda axes, given=given: figures.rows(axes, given, [3, 4], "dpo", ms=4, label="x")) == by_hand
    one_by_one = [lambda axes: [figures.rows(axes, x, y, "dpo", ms=4) for x, y in zip(FOUND, (3, 4))]]
    assert pixels(one_by_one[0]) == pixels(lambda axes: figures.rows(axes, FOUND, [3, 4], "dpo", ms=4))


def test_rows_may_share_a_height_and_have_no_intervals_and_any_colour():
    alone = pixels(lambda axes: axes.errorbar([0.5, 0.9], [2, 2], xerr=None, fmt="s", color="black", label="x"))
    assert pixels(lambda axes: figures.rows(axes, FOUND, 2, "black", bars=False, fmt="s", label="x")) == alone


def test_points_have_vertical_error_bars_and_a_curve_a_band():
    value, low, high = np.array([one[:3] for one in FOUND]).T
    colour, at = figures.COLOURS["steered"], [1.0, 2.0]
    bars = pixels(
        lambda axes: axes.errorbar(at, value, yerr=[value - low, high - value], fmt="o-", color=colour, label="x")
    )
    assert pixels(lambda axes: figures.points(axes, at, FOUND, "steered", fmt="o-", label="x")) == bars

    def by_hand(axes):
        axes.plot(at, value, color=colour, marker="o", label="x")
        axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)

    assert pixels(lambda axes: figures.curve(axes, at, FOUND, "steered", marker="o", label="x")) == pixels(by_hand)


def test_an_end_that_rounding_put_past_its_value_is_drawn_and_one_that_is_not_there_is_not():
    figures.use_style()
    axes = plt.subplots()[1]
    figures.rows(axes, [Estimate(0.5, 0.5 + 1e-16, 0.5), Estimate(*[float("nan")] * 3)], [0, 1], "dpo")
    ends = axes.collections[0].get_segments()
    assert np.ptp(ends[0][:, 0]) == pytest.approx(0) and len(axes.lines[0].get_xdata()) == 2


def test_unused_panels_are_blank_and_the_legend_is_one_for_all():
    figure, panels = plt.subplots(2, 2)
    for axes in panels.flat[:3]:
        axes.plot([0, 1], label="a line")
    figures.blank(panels, 3)
    figures.legend_above(figure, panels[0, 0], ncols=2)
    assert [axes.axison for axes in panels.flat] == [True, True, True, False]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a line"]


def test_nothing_is_at_zero_and_all_at_one():
    axes = plt.subplots()[1]
    figures.nothing_and_all(axes)
    assert [line.get_xdata()[0] for line in axes.lines] == [0, 1]


def test_colours_are_one_a_thing():
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)
    assert figures.LABELS.keys() == figures.COLOURS.keys()


@pytest.mark.parametrize(
    "token, label",
    [(" the é", "␣the␣é"), ("a\n", r"a\n"), ("\x17\t", r"\x17\t"), ("中", r"\u4e2d"), ("$$", r"\$\$"), ("\\n", r"\n")],
)
def test_a_token_s_label_shows_what_the_font_can_draw_and_escapes_the_rest(token, label):
    assert figures.token_label(token) == label


@pytest.mark.parametrize("token", ["$$", r"\$$", "$x", "\x17", "中", "\n"])
def test_a_token_s_label_is_drawn_as_one_line_of_text_without_a_warning(token):
    """`$$` as it is would be no formula and an error."""
    figures.use_style()
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.set_xticks([0], [figures.token_label(token)])
    with warnings.catch_warnings(action="error"):
        figure.savefig(io.BytesIO())


def test_figures_of_the_default_profile_are_committed():
    assert any(path.parent.name == "atlas" for path in COMMITTED)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_figure_says_what_to_see_and_where_it_comes_from(path):
    about = read(path)
    assert about["caption"].strip() and about["numbers"]
    assert path.with_suffix(".png").is_file()
    assert set(about["claims"]) <= set(claims.ALL)
    assert (places.PROJECT / "notebooks" / f"{about['notebook']}.ipynb").is_file()


@pytest.mark.parametrize("folder", sorted({path.parent for path in COMMITTED}), ids=lambda folder: folder.name)
def test_no_committed_picture_lacks_its_numbers(folder):
    assert {p.stem for p in folder.glob("*.png")} == {p.stem for p in folder.glob("*.json")} - {"claims"}


def test_a_text_keeps_its_spaces_and_escapes_what_the_font_cannot_draw():
    assert figures.drawable("a b\x17中 $") == r"a b\x17\u4e2d $"
