"""What steering makes of the log-ratio of chosen and rejected answers."""

from collections.abc import Sequence

import pandas as pd
from torch import Tensor

from helpers.lm import shared_prompts
from helpers.lm.batches import Tokens
from helpers.stages import tables
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def log_ratios(role: Role, chosen: Sequence[Tokens], rejected: Sequence[Tokens], deltas: Tensor) -> pd.DataFrame:
    """A row an arm and a pair: `margin`, log pi(chosen) - log pi(rejected) in nats, and `prefers`, whether it is above
    zero. deltas: what each arm adds at `final`, (arms, d)."""
    with role.opened() as model:
        one, other = (
            shared_prompts.answer_logps(
                model, answers, deltas, f"log-ratios, {role.name} + {len(deltas)} doses, {which}"
            )
            for which, answers in (("chosen", chosen), ("rejected", rejected))
        )
    return tables.by_arm(margin=one - other, prefers=(one > other).astype(float))
