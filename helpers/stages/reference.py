"""What the base makes of the pairs that partners are trained on, computed once for all of them."""

from collections.abc import Sequence

from helpers.lm import training
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.keys import Fixed
from helpers.stages.roles import Role


@stage(read=lambda kept: Fixed(map(tuple, kept)))
def base_logps(base: Role, chosen: Sequence[Tokens], rejected: Sequence[Tokens]) -> Sequence[tuple[float, float]]:
    """The base's log-probabilities of each pair's chosen and rejected answer, nats."""
    with base.opened() as model:
        return [pair.base_logps for pair in training.training_pairs(model, chosen, rejected)]
