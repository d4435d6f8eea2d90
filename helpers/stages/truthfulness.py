"""TruthfulQA's multiple choice, by log-probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.data import truthfulqa
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def truthfulness(role: Role, rows: Sequence[dict], deltas: Tensor) -> dict[str, Tensor]:
    """MC1 and MC2 with each of `deltas`, (arms, d), added at `final`: {"mc1", "mc2"}, (arms, N) each."""
    with role.opened() as model:
        found = truthfulqa.truthfulqa(model, role.tokenizer(), rows, deltas)
    return {name: torch.from_numpy(values) for name, values in found._asdict().items()}
