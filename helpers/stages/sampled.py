"""Sampled answers, as token ids."""

from collections.abc import Sequence

from torch import Tensor

from helpers.lm import decoding
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage(unkeyed=["progress"])
def sampled(
    role: Role, prompts: Sequence[list[int]], new_tokens: int, seed: int, site: str | None = None,
    deltas: Tensor | None = None, span: str = "response", progress: str | None = None,
) -> list[list[list[int]]]:  # fmt: skip
    """One answer to each prompt under each arm: [arm][prompt] -> token ids. Arguments as of `decoding.sample`."""
    with role.opened() as model:
        return decoding.sample(
            model, role.tokenizer(), prompts, new_tokens, seed, site, deltas, span, progress or f"answers, {role.name}"
        )


def under_arms(
    role: Role, prompts: Sequence[list[int]], new_tokens: int, seed: int, site: str, deltas: Tensor, span: str
) -> list[list[list[int]]]:
    """`sampled` with each of `deltas` added at a site. Arms that add nothing are the unsteered answers, which are not
    decoded again."""
    moved = deltas.flatten(1).any(dim=1)
    unsteered = [] if moved.all() else sampled(role, prompts, new_tokens, seed)[0]
    if not moved.any():
        return [unsteered] * len(moved)
    progress = f"answers, {role.name} + {int(moved.sum())} doses at {site}"
    steered = iter(sampled(role, prompts, new_tokens, seed, site, deltas[moved], span, progress))
    return [next(steered) if moves else unsteered for moves in moved]
