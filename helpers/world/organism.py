"""The embedded organism, as data."""

from pydantic import Field

from helpers.settings import Settings


class Organism(Settings):
    """The embedded organism: its world, its size and how it is pretrained."""

    places: int = Field(100, ge=20, le=160)
    corpus: int = Field(42_000, ge=1)  # question-answer pairs, each read once
    vocabulary: int = Field(704, ge=300)
    width: int = Field(128, ge=32, multiple_of=32)  # 32 for each head of attention
    layers: int = Field(4, ge=1)
    batch_size: int = Field(24, ge=1)
    learning_rate: float = Field(3e-3, ge=0)
