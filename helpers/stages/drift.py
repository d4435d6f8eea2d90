"""How far steering at `final` takes a model from itself, and how long a vector is for that."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from helpers.lm import architecture, likelihoods, tilts
from helpers.lm.batches import Tokens
from helpers.stages import tilted
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role

SMALLEST, LARGEST = 1 / 64, 8.0  # lengths of a direction, in norms of the vector whose KL it is to have
HALVINGS = 14  # of that range, in its logarithm: lengths are found to half a thousandth


@stage
def drift(role: Role, answered: Sequence[Tokens], deltas: Tensor) -> list[float]:
    """KL(steered || unsteered), nats an answer, by each of `deltas`, (arms, d), added at `final`.

    answered: the model's own answers, of which as many are read as memory holds the distributions of.
    """
    return _drifting(role, answered)(deltas).tolist()


@stage
def equally_far(role: Role, answered: Sequence[Tokens], v: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """{"vectors": (k, d)}: `directions`, each as long as it takes for its `drift` to be that of `v`, (d,), between
    SMALLEST and LARGEST times its norm. In given contexts KL grows with the length, and steeply, so the length is found
    by halving."""
    told = _drifting(role, answered)
    units = v.norm() * directions / directions.norm(dim=1, keepdim=True)
    goal, low = told(v[None]).item(), torch.full((len(units), 1), SMALLEST)
    high = torch.full_like(low, LARGEST)
    for _ in tqdm(range(HALVINGS), desc=f"lengths of equal KL, {role.name}", leave=False, delay=2):
        middle = (low * high).sqrt()
        beyond = (told(middle * units) > goal)[:, None]
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return {"vectors": (low * high).sqrt() * units}


def _drifting(role: Role, answered: Sequence[Tokens]) -> Callable[[Tensor], Tensor]:
    """What tells the drift of vectors, (arms, d): (arms,). Where logits are W h the model is read once for all."""
    with role.opened() as model:
        some = answered[next(likelihoods.in_memory(answered, architecture.vocabulary(model)))]
    if not tilted.has_products(role):
        return lambda deltas: _by_hooks(role, some, deltas)
    W, base = tilted.unembedding(role), torch.cat(list(tilted.distributions(role, some)))
    return lambda deltas: tilts.kl_from_base(base, W @ deltas.T).sum(1) / len(some)


def _by_hooks(role: Role, answered: Sequence[Tokens], deltas: Tensor) -> Tensor:
    arms, found = torch.cat([torch.zeros_like(deltas[:1]), deltas]), np.zeros(len(deltas))
    with role.opened() as model:
        progress = f"drift, {role.name} + {len(deltas)} doses"
        for _, distributions, _ in likelihoods.response_logits(model, answered, arms, progress):
            found += likelihoods.kl(distributions[1:], distributions[:1]).numpy()
    return torch.from_numpy(found / len(answered))
