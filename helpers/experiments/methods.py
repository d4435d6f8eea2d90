"""Ways to steer one base, compared at equal KL: constant vectors at `final`, a scaled adapter, and words.

All are brought to the KL(steered || base) that v* at dose 1 has, on the base's own answers to validation prompts.
Vectors are arms of one call; an adapter scaled by lambda is a model of its own. A prompt that asks for the behaviour
cannot be scaled: it changes the very contexts in which that KL is taken, and is told apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from torch import Tensor

from helpers.lm import encoding
from helpers.lm.adapters import NoPlainAdapter
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.stages import answers_read
from helpers.stages.beliefs import beliefs
from helpers.stages.divergences import divergences
from helpers.stages.drift import LARGEST
from helpers.stages.interventions import scaled
from helpers.stages.log_ratios import log_ratios
from helpers.stages.roles import Role
from helpers.study import Study

RANDOM = 100  # directions, of which the one with the largest effect is a control
BASE, WORDS = "base", "prompting"
REFUSES = "will not help"  # of the atlas: what only a refusal says

__all__ = ["BASE", "REFUSES", "WORDS", "NoPlainAdapter", "Ways", "scaled"]


def unlike(s: Study) -> tuple[str, Study] | None:
    """The name and the study of another preference on the same base, of the atlas one about stance where ours is about
    tone and the other way round; None where there is none to compare with."""
    others = [(name, s.about(data)) for name, data in s.profile.families.items() if data != s.profile.data]
    return min(others, key=lambda found: found[1].task.has_facts == s.task.has_facts, default=None)


def answer_states(s: Study) -> tuple[Tensor, Tensor]:
    """The base's states at `final` as it reads the held-in chosen and rejected answers, each averaged over its answer:
    (N, d) each."""
    chosen, rejected = (answers_read.answer_states(s.lm.role("base"), each)["mean"] for each in s.encoded("heldin"))
    return chosen, rejected


# --- Equal KL ---


def kl_of(s: Study, role: Role) -> np.ndarray:
    """KL(model || base) on the base's answers to validation prompts, nats an answer: (N,)."""
    answered, nothing = s.answered("base", s.prompts("validation")), s.nothing
    return divergences(s.lm.role("base"), role, answered, nothing)["kl"].to_numpy()


def adapter_scale(s: Study, kl: float) -> float:
    """lambda: how many times its adapter takes the base to a KL, nats an answer (`kl_of`), at most LARGEST times.
    Raises NoPlainAdapter where the partner is no plain adapter."""

    def beyond(scale: float) -> float:
        """How far a root of the KL, which is nearly linear in the scale, lies above the one asked for."""
        return (kl_of(s, scaled(s.lm.role("dpo"), scale)).mean() ** 0.5 if scale else 0.0) - kl**0.5

    high = 1.0
    while high < LARGEST and beyond(high) < 0:
        high *= 2
    return brentq(beyond, 0.0, high, xtol=1e-4, rtol=1e-3) if beyond(high) > 0 else high


# --- What each does ---


@dataclass(frozen=True)
class Ways:
    """Ways to steer a study's base. vectors: added at `final`, (d,) each. roles: models in the base's place. words:
    whether the behaviour is asked for in words too. What is measured is told by way, the base itself first."""

    s: Study
    vectors: Mapping[str, Tensor]
    roles: Mapping[str, Role]
    words: bool = False

    def answers(self, one: Study | None = None) -> dict[str, pd.DataFrame]:
        """What is answered to the held-out prompts of a study of the same base, by default its own, and judged: a row a
        prompt. Words ask for nothing but the study's own behaviour, so of another's prompts they are left out."""
        one = one or self.s
        found = self._by_way(lambda role, deltas: one.sweep(role, FINAL, deltas))
        return found | ({WORDS: self.s.prompted()} if self.words and one is self.s else {})

    def leads(self) -> dict[str, np.ndarray]:
        """By how many nats the true value is held likelier than the best other one, a value a fact that is asked for
        (the task's `facts_asked`). Of facts that are asked apart from the preference, words ask for nothing."""
        task, pairs = self.s.task, self.s.task.facts_asked(self.s.pairs["heldout"])
        found = self._by_way(lambda role, deltas: beliefs(role, task, pairs, deltas))
        if self.words and task.has_facts:
            asked = [replace(pair, prompt=task.asked_for(pair)) for pair in pairs]
            found[WORDS] = beliefs(self.s.lm.role("base"), task, asked, self._nothing)
        return {way: table["lead"].to_numpy() for way, table in found.items()}

    def margins(self) -> dict[str, np.ndarray]:
        """log pi(chosen) - log pi(rejected) of the held-out pairs, nats: (N,)."""
        both = self.s.encoded("heldout")
        found = self._by_way(lambda role, deltas: log_ratios(role, *both, deltas))
        if self.words:
            found[WORDS] = log_ratios(self.s.lm.role("base"), *map(self._asked, both), self._nothing)
        return {way: table["margin"].to_numpy() for way, table in found.items()}

    @property
    def _nothing(self) -> Tensor:
        return 0 * next(iter(self.vectors.values()))[None]

    def _by_way(self, measure: Callable[[Role, Tensor], pd.DataFrame]) -> dict[str, pd.DataFrame]:
        """What `measure` tells of each way, a row a prompt: vectors are arms of one call, models come one by one."""
        table = measure(self.s.lm.role("base"), torch.cat([self._nothing, *(v[None] for v in self.vectors.values())]))
        arms = enumerate([BASE, *self.vectors])
        found = {way: table[table["arm"] == arm].reset_index(drop=True) for arm, way in arms}
        return found | {way: measure(role, self._nothing) for way, role in self.roles.items()}

    def _asked(self, answered: list[Tokens]) -> list[Tokens]:
        """Held-out answers as answers to their prompts with the behaviour asked for."""
        texts = [self.s.task.asked_for(pair) for pair in self.s.pairs["heldout"]]
        prompts = [encoding.encode(self.s.lm.tokenizer, text).prompt for text in texts]
        return [Tokens(prompt, tokens.response) for prompt, tokens in zip(prompts, answered, strict=True)]
