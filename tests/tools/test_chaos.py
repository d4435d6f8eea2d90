"""What disturbed runs are held against: a file more, a file less, a byte of another value."""

import json
import random
import re

import pytest

from helpers.places import PROJECT
from helpers.stages import artifacts
from tools import chaos


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "TRIALS", tmp_path)
    found = chaos.Place("one")
    (found.figures / "chaos").mkdir(parents=True)
    (found.figures / "chaos" / "a.json").write_text("{}")
    kept = found.artifacts / "made-0123"
    kept.mkdir(parents=True)
    (kept / "value.json").write_text("[1]")
    (found.artifacts / ".locks").mkdir()
    (found.artifacts / ".locks" / "made-0123").touch()
    return found


DISTURBED = {
    "a byte": lambda place: chaos._flip(place.artifacts / "made-0123" / "value.json", random.Random(0)),
    "a file less": lambda place: (place.artifacts / "made-0123" / "value.json").unlink(),
    "a file more": lambda place: (place.figures / "chaos" / "b.png").touch(),
    "half a file left": lambda place: (place.figures / "chaos" / ".partial-a.json").touch(),
}


@pytest.mark.parametrize("what", DISTURBED)
def test_whatever_is_otherwise_is_told(place, what, capsys):
    files, outcome = place.bytes(), chaos.Outcome(place, "said", went_well=True)
    assert chaos._passes("one", outcome, files)
    assert "| nothing of 2 files | said | passes |" in capsys.readouterr().out
    DISTURBED[what](place)
    assert not chaos._passes("one", outcome, files)
    assert re.search(r"\| 1 of 2 files, (artifacts|figures)/\S+ first \| said \| FAILS \|", capsys.readouterr().out)


def test_a_trial_fails_too_where_its_files_are_right_and_something_else_is_not(place):
    assert not chaos._passes("one", chaos.Outcome(place, "nothing like it", went_well=False), place.bytes())


def test_a_flipped_byte_makes_an_artefact_damaged_wherever_it_is(place):
    folder = place.artifacts / "made-0123"
    manifest = {"key": "0123", "files": artifacts._checksums(folder)}
    (folder / artifacts.MANIFEST).write_text(json.dumps(manifest))
    assert chaos._is_whole(folder)
    chaos._flip(folder / "value.json", random.Random(1))
    assert not chaos._is_whole(folder)


def test_a_machine_s_folders_are_not_shown(place):
    (place.folder / "said.txt").write_text(f"No space is left for {PROJECT}/x: free some.\n")
    said = "No space is left for .../x: free some."
    assert chaos._sentence(place, r"No space is left for [^\n]*") == (said, True)
    assert chaos._sentence(place, "Another run") == (said, False)
