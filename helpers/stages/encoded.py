"""Preference pairs as token ids."""

from collections.abc import Sequence

from helpers.data.preferences import PreferencePair, encode_pairs
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def encoded_pairs(pairs: Sequence[PreferencePair], base: Role) -> list:
    """[the prompts with their chosen answers, with their rejected answers], each as [prompt ids, response ids]."""
    return encode_pairs(base.tokenizer(), pairs)
