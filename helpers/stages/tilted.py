"""Constant vectors at `final` as tilts of a model's distributions (lm/tilts.py), where its logits are W h."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.lm import architecture, likelihoods, steering, tilts
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role

MOST_LOGITS = 2**28  # of the contexts that a search holds: a GiB


@stage
def nearest_vector(role: Role, goal: Role, answered: Sequence[Tokens], contexts: int, seed: int) -> dict[str, Tensor]:
    """{"vector": (d,)}: v_opt of `role` towards `goal`, over at most so many contexts in which tokens of the goal's
    answers stand, drawn at random, or as many as MOST_LOGITS allow.

    answered: the goal's own answers. Raises NoBias where logits are more than W h.
    """
    W = unembedding(role)
    places = [(i, t) for i, tokens in enumerate(answered) for t in range(len(tokens.response))]
    n = min(contexts, len(places), MOST_LOGITS // len(W))
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:n].tolist()
    drawn: dict[int, list[int]] = {}  # tokens by answer
    for i, t in sorted(places[k] for k in order):
        drawn.setdefault(i, []).append(t)
    some = [answered[i] for i in drawn]
    base, wanted = (
        torch.cat([logps[at] for logps, at in zip(distributions(one, some), drawn.values())]) for one in (role, goal)
    )
    return {"vector": tilts.nearest_vector(W, base, wanted)}


@stage
def tilted_divergences(role: Role, goal: Role, answered: Sequence[Tokens], deltas: Tensor) -> pd.DataFrame:
    """A row an arm, a prompt and a token of its answer: `kl`, KL(goal || role tilted) of the token, nats.

    answered: the goal's own answers. deltas: what each arm adds to `role` at `final` (`steering.by_prompt`). Raises
    NoBias where logits are more than W h.
    """
    return kl_by_token(role, goal, answered, deltas)


def kl_by_token(role: Role, goal: Role, answered: Sequence[Tokens], deltas: Tensor) -> pd.DataFrame:
    """`tilted_divergences`, not kept."""
    W, found = unembedding(role), []
    of_all, given = W @ deltas.T if deltas.ndim == 2 else None, steering.by_prompt(deltas, len(answered))
    for i, (base, wanted) in enumerate(zip(distributions(role, answered), distributions(goal, answered))):
        A = [W @ its.T for its in given[:, i].unbind(1)] if of_all is None else [of_all]
        kl = _kl_by_token(base, wanted, A).numpy()
        arm, token = np.indices(kl.shape)
        found.append(pd.DataFrame({"arm": arm.ravel(), "prompt": i, "token": token.ravel(), "kl": kl.ravel()}))
    return pd.concat(found).sort_values(["arm", "prompt", "token"], ignore_index=True)


def summed(by_token: pd.DataFrame) -> pd.DataFrame:
    """What is told by token, summed over each answer's: a row an arm and a prompt."""
    return by_token.groupby(["arm", "prompt"])["kl"].sum().reset_index()


def _kl_by_token(base: Tensor, goal: Tensor, tilt: Sequence[Tensor]) -> Tensor:
    """KL(goal || tilted base) of each token of an answer, (arms, T). tilt: A of each token, (vocabulary, arms), that of
    the last one for all that follow."""
    *first, last = tilt[: len(base)]
    each = [tilts.kl_to_goal(base[t : t + 1], goal[t : t + 1], A) for t, A in enumerate(first)]
    return torch.cat([*each, tilts.kl_to_goal(base[len(first) :], goal[len(first) :], last)], dim=1)


def has_products(role: Role) -> bool:
    """Whether a model's logits are W h, so that a vector at `final` tilts its distributions."""
    try:
        unembedding(role)
    except steering.NoBias:
        return False
    return True


def unembedding(role: Role) -> Tensor:
    """W, (vocabulary, d), float32. Raises NoBias where logits are more than W h."""
    with role.opened() as model:
        W = architecture.unembedding(model).weight.detach().float().cpu()
        steering.check_products(model, W)
    return W


def distributions(role: Role, answered: Sequence[Tokens]) -> Iterator[Tensor]:
    """A model's next-token log-probabilities at every token of each answer, (T, vocabulary) float32, as many answers at
    a time as memory holds."""
    with role.opened() as model:
        vocabulary = architecture.vocabulary(model)
    for part in likelihoods.in_memory(answered, vocabulary):
        with role.opened() as model:
            found = likelihoods.response_distributions(model, answered[part], f"distributions, {role.name}")
        yield from (logps.float() for logps in found)
