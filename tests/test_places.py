"""Folders that are full or locked are told of in a sentence, and no file is left half-written."""

import errno
import os

import pytest
from safetensors import SafetensorError

from helpers import places


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space is left for"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "No space is left for"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space is left for"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "cannot be written to"),
        (PermissionError(errno.EACCES, "denied"), "cannot be written to"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "cannot be written to"),
    ],
)
def test_a_folder_that_takes_nothing_is_named_with_the_remedy(tmp_path, error, said):
    match = r" with WHERE=\. What was computed before is kept\.$"
    with pytest.raises(OSError, match=match) as caught, places.writing(tmp_path, "WHERE"):
        raise error
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone"),
        ValueError("no"),
        PermissionError(errno.EACCES, "denied", "/data/of/another/pairs.jsonl"),
        SafetensorError("I/O error: Is a directory (os error 21)"),
        RuntimeError("A cell failed: I/O error: No space left on device (os error 28)"),  # told of where it was raised
    ],
)
def test_other_errors_stay_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, places.writing(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("file", ["in/a.json", "in", "."])
def test_a_folder_that_cannot_be_made_or_filled_is_told_of(tmp_path, file):
    error = PermissionError(errno.EACCES, "denied", str(tmp_path / file))
    with pytest.raises(OSError, match=f"{tmp_path}/in cannot be written to"), places.writing(tmp_path / "in"):
        raise error


def test_a_file_takes_its_place_when_it_is_whole_and_not_before(tmp_path):
    path = tmp_path / "in" / "one.json"
    with places.whole(path) as file:
        file.write_text("first")
    with pytest.raises(OSError, match="No space is left"), places.whole(path) as file:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "first" and os.listdir(path.parent) == ["one.json"]
