"""A run of training, which keeps the partner at each of its stops."""

from collections.abc import Callable, Sequence
from pathlib import Path

from helpers.lm import training
from helpers.lm.recipe import Recipe
from helpers.lm.training import TrainingPair
from helpers.stages.artifacts import Artifact, stage
from helpers.stages.roles import Fresh


def train_within_memory(base: Fresh, pairs: Sequence[TrainingPair], recipe: Recipe, seed: int, folder: Path) -> None:
    """Train a partner into a folder, computing as many pairs of a batch at once as is fastest and fits into memory."""

    def attempt(at_once: int) -> None:
        model, tokenizer = base.load()
        few = min(at_once, training.fastest(model, pairs, recipe.batch_size))
        training.train(model, tokenizer, pairs, recipe, seed, folder, few)

    training.within_memory(attempt, recipe.batch_size)


def train(base: Fresh, pairs: Sequence[TrainingPair], recipe: Recipe, seed: int, folder: Path, at_once: int) -> None:
    """Train a partner into a folder, `at_once` pairs of a batch at a time."""
    model, tokenizer = base.load()
    training.train(model, tokenizer, pairs, recipe, seed, folder, at_once)


@stage(unkeyed=["train"])
def _run(
    folder: Path, base: Fresh, pairs: Sequence[TrainingPair], recipe: Recipe, seed: int,
    train: Callable = train_within_memory,
) -> None:  # fmt: skip
    """Fill a folder with the partner at the end and at each stop (adapters, or at rank 0 a whole model) and its log."""
    train(base, pairs, recipe, seed, folder)


def partner(
    base: Fresh, pairs: Sequence[TrainingPair], recipe: Recipe, seed: int, train: Callable = train_within_memory
) -> Artifact:
    """The partner trained by a recipe, from the run that it is the beginning of."""
    run = _run(base, pairs, recipe.run, seed, train)
    return Artifact(run.path / recipe.folder, f"{run.key}/{recipe.folder}")
