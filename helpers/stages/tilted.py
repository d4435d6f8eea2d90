"""Constant vectors at `final` as tilts of a model's distributions (lm/tilts.py), where its logits are W h."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.lm import architecture, likelihoods, steering, tilts
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.divergences import in_memory
from helpers.stages.roles import Role


@stage
def nearest_vector(role: Role, goal: Role, answered: Sequence[Tokens], contexts: int, seed: int) -> dict[str, Tensor]:
    """{"vector": (d,)}: v_opt of `role` towards `goal`, over at most so many contexts in which tokens of the goal's
    answers stand, drawn at random, and no more than memory holds.

    answered: the goal's own answers. Raises NoBias where logits are more than W h.
    """
    W = _unembedding(role)
    places = [(i, t) for i, tokens in enumerate(answered) for t in range(len(tokens.response))]
    n = min(contexts, len(places), likelihoods.MAX_LOGITS // len(W))
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:n].tolist()
    drawn: dict[int, list[int]] = {}  # tokens by answer
    for i, t in sorted(places[k] for k in order):
        drawn.setdefault(i, []).append(t)
    some = [answered[i] for i in drawn]
    base, wanted = (
        torch.cat([logps[at] for logps, at in zip(_distributions(one, some), drawn.values())]) for one in (role, goal)
    )
    return {"vector": tilts.nearest_vector(W, base, wanted)}


@stage
def tilted_divergences(role: Role, goal: Role, answered: Sequence[Tokens], deltas: Tensor) -> pd.DataFrame:
    """A row an arm, a prompt and a token of its answer: `kl`, KL(goal || role tilted) of the token, nats.

    answered: the goal's own answers. deltas: what each arm adds to `role` at `final`, (arms, d). Raises NoBias where
    logits are more than W h.
    """
    A, found = _unembedding(role) @ deltas.T, []
    for i, (base, wanted) in enumerate(zip(_distributions(role, answered), _distributions(goal, answered))):
        kl = tilts.kl_to_goal(base, wanted, A).numpy()
        arm, token = np.indices(kl.shape)
        found.append(pd.DataFrame({"arm": arm.ravel(), "prompt": i, "token": token.ravel(), "kl": kl.ravel()}))
    return pd.concat(found).sort_values(["arm", "prompt", "token"], ignore_index=True)


@stage
def tilted_drift(role: Role, answered: Sequence[Tokens], deltas: Tensor) -> list[float]:
    """KL(role tilted || role) by each of `deltas`, (arms, d), nats an answer, on the model's own answers. Raises NoBias
    where logits are more than W h."""
    A = _unembedding(role) @ deltas.T
    by_answer = [tilts.kl_from_base(base, A).sum(1) for base in _distributions(role, answered)]
    return torch.stack(by_answer).mean(0).tolist()


def _unembedding(role: Role) -> Tensor:
    with role.opened() as model:
        W = architecture.unembedding(model).weight.detach().float().cpu()
        steering.bias_on_logits(model, W[0])
    return W


def _distributions(role: Role, answered: Sequence[Tokens]) -> Iterator[Tensor]:
    """A model's next-token log-probabilities at every token of each answer, (T, vocabulary) float32, as many answers at
    a time as memory holds."""
    with role.opened() as model:
        vocabulary = architecture.vocabulary(model)
    for part in in_memory(answered, vocabulary):
        with role.opened() as model:
            found = likelihoods.response_distributions(model, answered[part], f"distributions, {role.name}")
        yield from (logps.float() for logps in found)
