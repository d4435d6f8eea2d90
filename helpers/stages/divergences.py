"""How far steering leaves one model's distribution from another's."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from helpers.lm import architecture, likelihoods, steering
from helpers.lm.batches import Tokens
from helpers.stages import tables, tilted
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def divergences(role: Role, goal: Role, answered: Sequence[Tokens], deltas: Tensor) -> pd.DataFrame:
    """A row an arm and a prompt: `kl`, KL(goal || steered) in nats, summed over an answer's tokens.

    answered: the goal's own answers. deltas: what each arm adds to `role` at `final` (`steering.by_prompt`).
    """
    with role.opened() as model:
        vocabulary = architecture.vocabulary(model)
    if tilted.has_products(role):
        return tilted.summed(tilted.kl_by_token(role, goal, answered, deltas))
    parts, named = list(likelihoods.in_memory(answered, vocabulary)), f"KL, {role.name} + {len(deltas)} doses"
    found = [
        _kl(role, goal, answered, deltas, part, named if len(parts) == 1 else f"{named}, part {i} of {len(parts)}")
        for i, part in enumerate(parts, start=1)
    ]
    return tables.by_arm(kl=np.concatenate(found, axis=1))


def _kl(role: Role, goal: Role, answered: Sequence[Tokens], deltas: Tensor, part: slice, progress: str) -> np.ndarray:
    some = answered[part]
    given = steering.by_prompt(deltas, len(answered))[:, part]
    with goal.opened() as model:
        distributions = likelihoods.response_distributions(model, some, f"{progress}, the goal")
    with role.opened() as model:
        return likelihoods.kl_to(distributions, model, some, given, progress)
