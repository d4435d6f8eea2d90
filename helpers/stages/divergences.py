"""How far steering leaves one model's distribution from another's."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from helpers.lm import architecture, likelihoods, steering
from helpers.lm.batches import Tokens
from helpers.stages import tables
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def divergences(role: Role, goal: Role, answered: Sequence[Tokens], deltas: Tensor) -> pd.DataFrame:
    """A row an arm and a prompt: `kl`, KL(goal || steered) in nats, summed over an answer's tokens.

    answered: the goal's own answers. deltas: what each arm adds to `role` at `final` (`steering.by_prompt`).
    """
    with role.opened() as model:
        vocabulary = architecture.vocabulary(model)
    parts, named = list(in_memory(answered, vocabulary)), f"KL, {role.name} + {len(deltas)} doses"
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


def in_memory(answered: Sequence[Tokens], vocabulary: int) -> Iterator[slice]:
    """As many answers at a time as their next-token distributions may be kept in memory."""
    longest = max(len(tokens.response) for tokens in answered)
    n = max(1, likelihoods.MAX_LOGITS // (vocabulary * max(longest, 1)))
    return (slice(i, i + n) for i in range(0, len(answered), n))
