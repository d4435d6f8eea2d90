"""Preference pairs as token ids."""

from collections.abc import Sequence

from helpers.data.preferences import PreferencePair, encode_pairs
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.keys import Fixed
from helpers.stages.roles import Role


def _as_tokens(kept: list[list]) -> tuple[Sequence[Tokens], ...]:
    return tuple(Fixed(Tokens(*ids) for ids in answers) for answers in kept)


@stage(read=_as_tokens)
def encoded_pairs(pairs: Sequence[PreferencePair], base: Role) -> tuple[Sequence[Tokens], ...]:
    """The prompts with their chosen answers, and with their rejected answers."""
    return encode_pairs(base.tokenizer(), pairs)
