"""A model's states averaged over answers, where the unembedding reads them."""

from collections.abc import Sequence

from torch import Tensor

from helpers.lm import activations
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def answer_means(role: Role, answered: Sequence[Tokens]) -> dict[str, Tensor]:
    """{"means": (N, d) float32}: the states at `final` of each answer's tokens, averaged, as the model reads it."""
    progress = f"answers' states, {role.name}"
    with role.opened() as model:
        found = activations.hidden_states(model, answered, [FINAL], ["response_mean"], progress)
    return {"means": found[FINAL, "response_mean"]}
