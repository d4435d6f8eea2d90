"""What a model holds true, whatever it would say."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from helpers.data.preferences import PreferencePair, TaskBase
from helpers.lm import encoding, shared_prompts
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def beliefs(role: Role, task: TaskBase, pairs: Sequence[PreferencePair], deltas: Tensor) -> pd.DataFrame:
    """Every value of the asked kind is scored in the answer that states it without a tone, with each of `deltas`
    (`steering.by_prompt`) added at `final`. A row an arm and a prompt: `rank` of the true value by log-probability, 1
    the likeliest, and `lead`, its log-probability less that of the best other one, in nats.
    """
    stated, tokenizer = [task.stated(pair) for pair in pairs], role.tokenizer()
    sequences = [
        encoding.encode(tokenizer, pair.prompt, answer) for pair, answers in zip(pairs, stated) for answer in answers
    ]
    with role.opened() as model:
        logps = shared_prompts.answer_logps(model, sequences, deltas, f"beliefs, {role.name}")
    ends = np.cumsum([len(answers) for answers in stated])[:-1]
    return pd.DataFrame(
        [
            {"arm": arm, "prompt": i, "rank": int((row > row[0]).sum()) + 1, "lead": row[0] - row[1:].max()}
            for i, by_arm in enumerate(np.split(logps, ends, axis=1)) for arm, row in enumerate(by_arm)
        ]
    )  # fmt: skip
