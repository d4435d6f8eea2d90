"""What a task's judge says of sampled answers."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from helpers.data.preferences import PreferencePair, TaskBase
from helpers.lm import decoding, encoding, likelihoods, shared_prompts
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role
from helpers.stages.sampled import Answers


def lacks_some(table: pd.DataFrame) -> bool:
    """Whether the judge could not be asked of some answers: they are to be judged in a later session."""
    return bool(table["preferred"].isna().any())


@stage(is_unfinished=lacks_some)
def judgements(
    task: TaskBase, pairs: Sequence[PreferencePair], prompts: Sequence[list[int]], answers: Answers, new_tokens: int,
    base: Role, fluency: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """`judgement_table`, kept."""
    return judgement_table(task, pairs, prompts, answers, new_tokens, base, fluency)


def judgement_table(
    task: TaskBase, pairs: Sequence[PreferencePair], prompts: Sequence[list[int]], answers: Answers, new_tokens: int,
    base: Role, fluency: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """A row an arm and a prompt: `arm`, `prompt`, the first draw's `text` and `ids`, and what the judge says, each
    criterion as its mean over the draws.

    fluency: whether that is asked. Where no rule knows well-formed text, `token_loss` stands in, of the first draw
    alone, since each answer has to be read again: the base's mean loss a token of an answer and its end (of those that
    there are, the likeliest), nats.
    Answers that are the same are judged once.
    """
    said = np.array(answers.said)  # (arms, draws, prompts)
    asked = np.broadcast_to(np.arange(said.shape[2]), said.shape)
    (prompt, place), of_draws = np.unique(np.stack([asked.ravel(), said.ravel()]), axis=1, return_inverse=True)
    texts = decoding.texts(base.tokenizer(), answers.distinct)
    judged = pd.DataFrame(task.judgements([pairs[i] for i in prompt], [texts[i] for i in place]))
    by_draw = judged.iloc[of_draws.ravel()].set_index([np.indices(said.shape)[i].ravel() for i in (0, 2)])
    table = by_draw.groupby(level=[0, 1]).mean()
    table.loc[by_draw["preferred"].isna().groupby(level=[0, 1]).any(), "preferred"] = np.nan
    table = table.rename_axis(["arm", "prompt"]).reset_index()
    if fluency and "well_formed" not in judged:
        once, row = np.unique(of_draws.reshape(said.shape)[:, 0], return_inverse=True)
        ids = [answers.distinct[i] for i in place[once]]
        table["token_loss"] = _token_losses(base, [prompts[i] for i in prompt[once]], ids, new_tokens)[row.ravel()]
    first = said[:, 0].ravel()
    table.insert(2, "text", [texts[i] for i in first])
    table.insert(3, "ids", [answers.distinct[i] for i in first])
    return table


def _token_losses(
    base: Role, prompts: Sequence[list[int]], answers: Sequence[list[int]], new_tokens: int
) -> np.ndarray:
    ends = encoding.ends(base.tokenizer())
    with base.opened() as model:
        losses = [
            likelihoods.token_losses(model, ended, "loss under the base", shared_prompts.answer_logps)
            for ended in with_ends(prompts, answers, ends, new_tokens)
        ]
    return np.fmin.reduce(losses)


def with_ends(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], ends: Sequence[int], new_tokens: int
) -> Iterator[list[Tokens]]:
    """Sampled answers to prompts, each with its end unless it was cut at `new_tokens` before it came to one: for each
    of the tokens that end an answer in turn, since a sample does not keep its own."""
    for end in ends or [None]:
        yield [Tokens(p, encoding.ended(ids, end, new_tokens)) for p, ids in zip(prompts, answers, strict=True)]
