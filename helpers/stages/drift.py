"""How far steering takes a model from itself."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.lm import architecture, likelihoods
from helpers.lm.batches import Tokens
from helpers.stages import tables, tilted
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def drift(role: Role, answered: Sequence[Tokens], deltas: Tensor) -> pd.DataFrame:
    """A row an arm and a prompt: `kl`, KL(steered || unsteered) in nats, summed over an answer's tokens.

    answered: the model's own answers. deltas: what each arm adds at `final`, (arms, d).
    """
    with role.opened() as model:
        small = architecture.is_small(model)
    if not small and tilted.has_products(role):
        return tables.by_arm(kl=tilted.drift_by_answer(role, answered, deltas).numpy())
    arms = torch.cat([torch.zeros_like(deltas[:1]), deltas])
    found = np.empty((len(deltas), len(answered)))
    with role.opened() as model:
        progress = f"drift, {role.name} + {len(deltas)} doses"
        for i, distributions, _ in likelihoods.response_logits(model, answered, arms, progress):
            found[:, i] = likelihoods.kl(distributions[1:], distributions[:1]).numpy()
    return tables.by_arm(kl=found)
