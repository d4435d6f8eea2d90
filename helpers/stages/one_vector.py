"""One vector trained by a partner's loss in place of an adapter."""

from collections.abc import Sequence

from torch import Tensor

from helpers.lm import bipo, training
from helpers.lm.recipe import Recipe
from helpers.lm.training import TrainingPair
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def one_vector(
    base: Role, pairs: Sequence[TrainingPair], site: str, recipe: Recipe, scale: float, seed: int
) -> dict[str, Tensor]:
    """{"vector": (d,)}: trained at a site by the recipe's loss (`bipo.optimised_vector`)."""
    relabelled = training.relabelled(pairs, recipe.labels, seed)
    with base.opened() as model:
        return {"vector": bipo.optimised_vector(model, relabelled, site, recipe, scale, seed)}
