"""What a task's judge says of sampled answers."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from helpers.data.preferences import PreferencePair, TaskBase
from helpers.lm import decoding, encoding, likelihoods
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


def lacks_some(table: pd.DataFrame) -> bool:
    """Whether the judge could not be asked of some answers: they are to be judged in a later session."""
    return bool(table["preferred"].isna().any())


@stage(is_unfinished=lacks_some)
def verdicts(
    task: TaskBase, pairs: Sequence[PreferencePair], prompts: Sequence[list[int]], answers: Sequence, new_tokens: int,
    base: Role,
) -> pd.DataFrame:  # fmt: skip
    """`verdict_table`, kept."""
    return verdict_table(task, pairs, prompts, answers, new_tokens, base)


def verdict_table(
    task: TaskBase, pairs: Sequence[PreferencePair], prompts: Sequence[list[int]], answers: Sequence, new_tokens: int,
    base: Role,
) -> pd.DataFrame:  # fmt: skip
    """A row an arm and a prompt: `arm`, `prompt`, `text`, `ids` and what the judge says of the answer.

    answers: [arm][prompt] -> token ids. Where no rule knows well-formed text, `token_loss` stands in: the base's mean
    loss a token of an answer and its end (of those that there are, the likeliest), nats.
    """
    rows, tokenizer = [], base.tokenizer()
    for arm, ids in enumerate(answers):
        texts = decoding.texts(tokenizer, ids)
        for i, verdict in enumerate(task.verdicts(pairs, texts)):
            rows.append({"arm": arm, "prompt": i, "text": texts[i], "ids": ids[i], **verdict})
    table = pd.DataFrame(rows)
    if "well_formed" not in table:
        asked = [prompts[i] for i in table["prompt"]]
        ends = encoding.ends(tokenizer)
        with base.opened() as model:
            losses = [
                likelihoods.token_losses(model, ended, "loss under the base")
                for ended in with_ends(asked, table["ids"], ends, new_tokens)
            ]
        table["token_loss"] = np.fmin.reduce(losses)
    return table


def with_ends(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], ends: Sequence[int], new_tokens: int
) -> Iterator[list[Tokens]]:
    """Sampled answers to prompts, each with its end unless it was cut at `new_tokens` before it came to one: for each
    of the tokens that end an answer in turn, since a sample does not keep its own."""
    for end in ends or [None]:
        yield [Tokens(p, encoding.ended(ids, end, new_tokens)) for p, ids in zip(prompts, answers, strict=True)]
