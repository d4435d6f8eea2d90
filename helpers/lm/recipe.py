"""How a partner is trained, as data."""

import math
from itertools import product
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from helpers.settings import Settings

OBJECTIVES = ("dpo", "sft")
LABELS = ("true", "shuffled", "reversed")
# Shares of a run after which its adapter is kept; 0 is the first step.
STOPS = (0.0, 0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)


class Recipe(Settings):
    """How a partner is trained (TRL's DPOTrainer, a PEFT LoRA adapter on every linear layer of the blocks).

    The learning rate is constant, from the first step on: a run that is stopped early is the beginning of the whole
    one, both are had by one training, and the first step is one of the others' size.
    objective: "dpo", or "sft", the control that keeps the same batches and steps and drops the sigmoid term.
    labels: which answer of a pair counts as chosen: the "true" one or, as controls, either at random ("shuffled") or
    the other one ("reversed").
    stop: after which share of the run it is stopped, one of STOPS.
    """

    beta: float = Field(1.0, ge=0)  # the paper's
    learning_rate: float = Field(5e-4, ge=0)
    epochs: int = Field(1, ge=1)
    stop: Literal[STOPS] = 1.0
    batch_size: int = Field(32, ge=1)
    rank: int = Field(8, ge=0)  # of the adapter; 0 trains all weights of the blocks instead
    nll_weight: float = Field(0.0, ge=0)  # weight of an added NLL term on the chosen answers; 0 is plain sigmoid DPO
    objective: Literal[OBJECTIVES] = "dpo"
    labels: Literal[LABELS] = "true"
    seed: int = Field(0, ge=0)  # of the order of the pairs and the adapter's first weights, added to the profile's

    @model_validator(mode="after")
    def _keeps_what_it_stops_at(self) -> Self:
        if not self.rank and self.stop < 1:
            raise ValueError("recipe.stop must be 1 at rank 0: whole models are kept at their run's end alone.")
        return self

    @property
    def run(self) -> Self:
        """The whole run that this recipe is the beginning of."""
        return self.replace(stop=1.0)

    @property
    def folder(self) -> str:
        """Where in the folder of its run the adapter is kept."""
        return "." if self.stop == 1 else f"stop-{self.stop:g}"


def step_of(stop: float, steps: int) -> int:
    """After which of a run's steps it is stopped: the first at 0, the last at 1."""
    return max(1, math.ceil(stop * steps))


class Grid(Settings):
    """What is tried: every combination of these values; where there is none, a recipe's own."""

    beta: Annotated[tuple[float, ...], Field(strict=False)] = ()
    learning_rate: Annotated[tuple[float, ...], Field(strict=False)] = ()
    stop: Annotated[tuple[float, ...], Field(strict=False)] = ()

    def recipes(self, recipe: Recipe) -> tuple[Recipe, ...]:
        """The recipes of the grid, which differ from `recipe` in its fields alone."""
        values = {name: values or (getattr(recipe, name),) for name, values in self}
        return tuple(recipe.replace(**dict(zip(values, found))) for found in product(*values.values()))
