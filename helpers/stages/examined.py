"""The health of a partner, on validation prompts."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

from helpers.data.preferences import PreferencePair, TaskBase
from helpers.stages.health import Health
from helpers.stages.judgements import judgements
from helpers.stages.roles import Both, Role
from helpers.stages.sampled import sampled

CRITERIA = {
    "fact_loss": lambda x, health: x <= health.max_fact_loss,
    "well_formed": lambda x, health: x >= health.min_well_formed,
    "perplexity_ratio": lambda x, health: x <= health.max_perplexity_ratio,
}


def examined(
    task: TaskBase, pairs: Sequence[PreferencePair], prompts: Sequence[list[int]], base_answers: pd.DataFrame,
    both: Both, base: Role, new_tokens: int, seed: int, draws: int,
    temperature: float,
) -> tuple[dict[str, float], pd.DataFrame]:  # fmt: skip
    """What the health criteria and the choice between recipes are about, and a partner's judged answers."""
    models = cache(both.load)
    partner, alone = (
        Role(name, key, lambda name=name: models().playing(name), lambda: models().tokenizer)
        for name, key in (("dpo", both.key), ("base", base.key))
    )
    said = sampled(partner, prompts, new_tokens, seed, draws, temperature=temperature)
    answers = judgements(task, pairs, prompts, said, new_tokens, alone)
    measured = {"preferred": float(answers["preferred"].mean())}
    if "fact" in answers:
        measured["fact_loss"] = float(base_answers["fact"].mean() - answers["fact"].mean())
    return measured | fluency(answers, base_answers), answers


def fluency(answers: pd.DataFrame, base: pd.DataFrame) -> dict[str, float]:
    """What the health criteria ask of text: its share that is well-formed or, where no rule knows, its perplexity under
    the base against that of the base's own answers."""
    if "well_formed" in answers:
        return {"well_formed": float(answers["well_formed"].mean())}
    return {"perplexity_ratio": float(np.exp(answers["token_loss"].mean() - base["token_loss"].mean()))}


def is_fluent(answers: pd.DataFrame, base: pd.DataFrame, health: Health) -> bool:
    """Whether text loses no more against the base's own than the health criteria allow."""
    found = fluency(answers, base)
    if "well_formed" in found:  # where the base's own text is not faultless, steering need not mend it
        return bool(found["well_formed"] >= base["well_formed"].mean() - (1 - health.min_well_formed))
    return not failed_criteria(found, health)


def failed_criteria(measured: dict[str, float], health: Health) -> list[str]:
    """The names of the health criteria that measured values do not meet."""
    return [name for name, meets in CRITERIA.items() if name in measured and not meets(measured[name], health)]
