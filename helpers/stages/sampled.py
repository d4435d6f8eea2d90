"""Sampled answers, as token ids."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from helpers.lm import decoding
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


class Answers(NamedTuple):
    """Several answers to each prompt under each arm. Most are said more than once, and kept once.

    said: [arm][draw][prompt] -> the place of its token ids in `distinct`.
    """

    distinct: list[list[int]]
    said: list[list[list[int]]]

    def first(self, arm: int = 0) -> list[list[int]]:
        """The token ids of the first draw of an arm, by prompt."""
        return [self.distinct[i] for i in self.said[arm][0]]


@stage(unkeyed=["progress"])
def _sampled(
    role: Role, prompts: Sequence[list[int]], new_tokens: int, seed: int | None, draws: int, site: str | None,
    deltas: Tensor | None, span: str, temperature: float, progress: str,
) -> tuple[list, list]:  # fmt: skip
    with role.opened() as model:
        rows = decoding.sample(
            model, role.tokenizer(), prompts, new_tokens, seed, site, deltas, span, progress, draws, temperature
        )
    places: dict[tuple, int] = {}
    said = [[places.setdefault(tuple(ids), len(places)) for ids in row] for row in rows]
    return list(map(list, places)), [said[i : i + draws] for i in range(0, len(said), draws)]


def sampled(
    role: Role, prompts: Sequence[list[int]], new_tokens: int, seed: int | None, draws: int = 1,
    site: str | None = None, deltas: Tensor | None = None, span: str = "response", temperature: float = 1.0,
) -> Answers:  # fmt: skip
    """Answers to prompts. Arguments as of `decoding.sample`."""
    progress = f"answers, {role.name}" + ("" if deltas is None else f" + {len(deltas)} doses at {site}")
    return Answers(*_sampled(role, prompts, new_tokens, seed, draws, site, deltas, span, temperature, progress))


def under_arms(
    role: Role, prompts: Sequence[list[int]], new_tokens: int, seed: int, draws: int, site: str, deltas: Tensor,
    span: str, temperature: float = 1.0,
) -> Answers:  # fmt: skip
    """`sampled` with each of `deltas` added at a site. Arms that add nothing are the unsteered answers, which are not
    decoded again."""
    moved = deltas.flatten(1).any(dim=1).tolist()
    if all(moved):
        return sampled(role, prompts, new_tokens, seed, draws, site, deltas, span, temperature)
    unsteered = sampled(role, prompts, new_tokens, seed, draws, temperature=temperature)
    if not any(moved):
        return Answers(unsteered.distinct, unsteered.said * len(moved))
    steered = sampled(role, prompts, new_tokens, seed, draws, site, deltas[moved], span, temperature)
    arms = iter((np.array(steered.said) + len(unsteered.distinct)).tolist())
    return Answers(
        unsteered.distinct + steered.distinct, [next(arms) if moves else unsteered.said[0] for moves in moved]
    )
