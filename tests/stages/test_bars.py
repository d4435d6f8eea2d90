"""Bars of worker processes: where they stand is told in a file, and shown behind the bar of the process that waits."""

import os
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from helpers.stages import bars


def methods():
    return vars(tqdm)["__init__"], vars(tqdm)["display"]


def test_the_innermost_bar_is_told_and_none_is_drawn(tmp_path, capsys):
    kept, path, said = methods(), tmp_path / str(os.getpid()), []
    with bars.told(tmp_path):
        for _ in tqdm(range(2), desc="outer", mininterval=0):
            for _ in tqdm(range(3), desc="inner", mininterval=0, leave=False):
                said.append(path.read_text())
    assert said[0] == "inner 0/3" and said[2].startswith("inner 2/3, 00:00 left")
    assert not path.exists() and methods() == kept
    assert capsys.readouterr() == ("", "")


def test_bars_are_as_they_were_after_what_fails(tmp_path):
    kept = methods()
    with pytest.raises(KeyError), bars.told(tmp_path / "of another machine"):
        list(tqdm(range(2)))
        raise KeyError
    assert methods() == kept and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "n, total, elapsed, text", [(0, 8, 0, "x 0/8"), (2, 8, 4, "x 2/8, 00:12 left"), (5, None, 4, "x 5")]
)
def test_a_line_says_how_far_a_bar_is(n, total, elapsed, text):
    about = {"rate": None, "elapsed": elapsed}
    assert bars.line(SimpleNamespace(desc="x: ", n=n, total=total, format_dict=about)) == text
