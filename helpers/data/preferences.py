"""Preference pairs: prompts with a chosen and a rejected answer, in splits of which no two share a prompt."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from helpers.lm import encoding
from helpers.lm.batches import Tokens
from helpers.lm.encoding import Message, Prompt
from helpers.world.question import Question

SPLITS = ("heldin", "validation", "heldout")


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the answer preferred and the one not. Of a conversation, `messages` are its turns and `prompt` is all
    of them as plain text. Of the atlas, `question` is what was asked and `family` what the pair is about. A prompt
    alone has two empty answers. Raises ValueError for a text that is empty or none, and for an answer preferred to
    itself."""

    prompt: str
    chosen: str
    rejected: str
    question: Question | None = None
    family: str | None = None
    sampled: tuple[Tokens, Tokens] | None = None  # chosen and rejected exactly as a model sampled them
    messages: tuple[Message, ...] | None = None

    def __post_init__(self):
        is_alone = self.chosen == self.rejected == ""
        for name in ("prompt",) if is_alone else ("prompt", "chosen", "rejected"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"A preference row's {name!r} must be a non-empty string, got {value!r}: mend or drop it."
                )
        if self.chosen == self.rejected and not is_alone:
            raise ValueError(f"A preference row prefers an answer to itself ({self.chosen!r}): mend or drop it.")

    @property
    def asked(self) -> Prompt:
        """What `encoding.encode` reads: the conversation, where the prompt is one."""
        return self.messages or self.prompt


def pair_from(row: dict) -> PreferencePair:
    """The pair that `dataclasses.asdict` and JSON turned into a row."""
    question = row["question"] and Question(**row["question"])
    sampled = row["sampled"] and tuple(Tokens(*tokens) for tokens in row["sampled"])
    messages = row["messages"] and tuple(map(tuple, row["messages"]))
    return PreferencePair(**{**row, "question": question, "sampled": sampled, "messages": messages})


def pair_about(prompt: Prompt, chosen: str, rejected: str, **more) -> PreferencePair:
    """The pair of a prompt that is a text or a conversation."""
    if isinstance(prompt, str):
        return PreferencePair(prompt, chosen, rejected, **more)
    return PreferencePair(encoding.plain(prompt), chosen, rejected, messages=prompt, **more)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair]
) -> tuple[list[Tokens], list[Tokens]]:
    """The prompts with their chosen, and with their rejected answers, as token ids."""
    both = [
        pair.sampled or [encoding.encode(tokenizer, pair.asked, answer) for answer in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    return [chosen for chosen, _ in both], [rejected for _, rejected in both]


def begins(one: Tokens, other: Tokens) -> bool:
    """Whether one response is the other's beginning: then no token tells them apart."""
    return all(token == another for token, another in zip(one.response, other.response))


class Drawn(NamedTuple):
    """The pairs of each split, and what became of every row that they were drawn from: {what: rows}."""

    pairs: dict[str, list[PreferencePair]]
    account: dict[str, int]


class TaskBase:
    """A kind of preference: where its pairs come from, and a judge of any answer to their prompts.
    Its fields are all that decides what it draws and says."""

    sides: tuple[str, str]  # what it prefers, as an axis calls it, and the opposite
    preferred = property(lambda self: self.sides[0])
    opposed = property(lambda self: self.sides[1])
    has_facts = False  # whether answers state a fact that is known by rule, and none of the preference's business
    has_beliefs = False  # whether there are facts that can be asked apart from it (`facts_asked`, `stated`)
    factors = ("prompts",)  # what prompts share with others, in a word each: what `levels` tells of one
    has_words = False  # whether there are words that ask for what is preferred (`asked_for`)
    has_judge = True  # whether `judgements` says anything: nothing does of prompts alone

    def judgements(self, pairs: Sequence[PreferencePair], answers: Sequence[str]) -> list[dict[str, float]]:
        """What the judge says of an answer to each pair's prompt, 1 or 0: `preferred`, whether it shows what is
        preferred, `not_opposed`, whether it does not show the opposite, and what else the task knows."""
        return [self.judgement(pair, answer) for pair, answer in zip(pairs, answers, strict=True)]


def draw_prompts(rng: random.Random, pool: list, n: int, split: str) -> list:
    """A sample of n prompts for a split. Raises ValueError where there are fewer."""
    if n > len(pool):
        raise ValueError(
            f"The {split} split has {len(pool)} prompts, fewer than the {n} asked for: lower sizes.{split}."
        )
    return rng.sample(pool, n)
