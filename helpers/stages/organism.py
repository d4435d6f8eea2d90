"""The embedded organism, pretrained once."""

from pathlib import Path

from helpers.stages.artifacts import stage
from helpers.world import pretraining
from helpers.world.organism import Organism


@stage
def organism(folder: Path, spec: Organism, seed: int) -> None:
    """Fill a folder with the organism, its tokenizer and its loss curve."""
    pretraining.pretrain(spec, seed, folder)
