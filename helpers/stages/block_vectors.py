"""Vectors in the blocks that bring a model nearest to its partner (lm/block_vectors.py)."""

from collections.abc import Sequence

from torch import Tensor

from helpers.lm import activations, block_vectors, likelihoods
from helpers.lm.batches import Tokens
from helpers.lm.block_vectors import Towards
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def nearest_vectors(
    role: Role, goal: Role, heldin: Sequence[Tokens], validation: Sequence[Tokens], sites: Sequence[str]
) -> dict[str, Tensor]:
    """{site: (d,)}: the vectors at these sites, found jointly on the goal's own answers to held-in prompts, and for as
    long as those to validation prompts come nearer too."""
    with goal.opened() as model:
        towards, others = (
            Towards(some, likelihoods.response_distributions(model, some, f"distributions, {goal.name}"))
            for some in (heldin, validation)
        )
    with role.opened() as model:
        states = activations.hidden_states(model, heldin, sites)
        scales = {site: states[site, "prompt_last"].square().mean().sqrt().item() for site in sites}
        named = f"vectors at {', '.join(sites)}"
        return block_vectors.nearest_vectors(model, towards, others, scales, progress=named)
