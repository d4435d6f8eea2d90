"""Given answers as a model reads them: its states, and how likely it holds them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.lm import likelihoods
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def answer_states(role: Role, answers: Sequence[Tokens]) -> dict[str, Tensor]:
    """A model's states at `final` over each answer, (N, d) float32: "mean", of the states at the answer's tokens
    (`response_mean`), and "sum", of those that predict them, one token earlier.

    Raises ValueError for an answer that is empty.
    """
    if not all(tokens.response for tokens in answers):
        raise ValueError("An answer is empty: there are no states to average over.")
    with role.opened() as model:
        found = likelihoods.response_states(model, answers, f"states of answers, {role.name}")
    return {"mean": torch.stack([h[1:].mean(0) for h in found]), "sum": torch.stack([h[:-1].sum(0) for h in found])}


@stage
def answer_logps(role: Role, answers: Sequence[Tokens]) -> list[float]:
    """A model's log-probability of each answer, nats."""
    with role.opened() as model:
        return likelihoods.response_logps(model, answers, progress=f"log-probabilities, {role.name}").tolist()
