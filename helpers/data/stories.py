"""Controlled sentiment on stories: a language model's own continuations, judged by VADER."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers.data.naming import CONDITIONAL
from helpers.data.on_policy import best_and_worst
from helpers.data.preferences import SPLITS, Drawn, PreferencePair, TaskBase, draw_prompts
from helpers.data.sentiment import sentiment
from helpers.data.sizes import Sizes
from helpers.lm.encoding import Prompt

HEROES = tuple(
    f"a {kind} named {name}"
    for kind in ("little girl", "little boy", "small cat", "big dog", "young bear", "brown bunny")
    for name in ("Lily", "Tim", "Mia", "Max", "Sue", "Ben", "Anna", "Sam", "Lucy", "Tom")
)
EVENTS = {
    "heldin": (
        "went to the park with a red ball", "found a box under the bed", "saw a bird in a tall tree",
        "heard a loud noise outside", "wanted to climb the hill", "met a boy who had a kite",
        "walked into the dark forest", "looked at the big lake", "took a toy from a friend",
        "tried to bake a cake", "lost a shoe in the grass", "played a game in the rain",
        "saw a cookie on the table", "opened the door of the old house", "built a tower of blocks",
        "rode a bike down the street", "asked mom for a pet", "hid behind the couch",
    ),
    "validation": ("found a key in the garden", "wanted to swim in the river", "saw a big truck on the road"),
    "heldout": (
        "went to the beach with dad", "found a shiny rock in the sand", "saw a frog near the pond",
        "heard a voice in the attic", "wanted to touch the hot stove", "met an old man with a hat",
        "climbed up a tall ladder", "looked for a lost doll", "shared a sandwich with a bird",
        "broke a cup in the kitchen",
    ),
}  # fmt: skip
SADDENED = ("little boy", "big dog", "brown bunny")  # whose stories `vader-conditional` prefers sad


@dataclass(frozen=True)
class StoryTask(TaskBase):
    """Controlled sentiment on stories (the DPO paper's first task): pairs are the model's own continuations of an
    opening, the happiest and the saddest by VADER's compound score; the behaviour is the score's sign.
    data: PLAIN, where happy stories are preferred, or CONDITIONAL, where sad ones are for half of the heroes."""

    data: str
    seed: int
    sizes: Sizes
    has_words = True

    @property
    def sides(self) -> tuple[str, str]:
        return ("story as asked for", "opposite story") if self.data == CONDITIONAL else ("happy story", "sad story")

    def draw(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Drawn:
        """Pairs for each split, sampled from `model`; openings of different splits tell of different events. They end
        in a space where the tokenizer's words do: elsewhere a space alone is a token that hardly any text goes on from.
        """
        end = " " if _ends_words_with_a_space(tokenizer) else ""
        openings = {split: [f"{opening}{end}" for opening in self.openings(split)] for split in SPLITS}
        return best_and_worst(model, tokenizer, openings, self.rates, self.sizes, self.seed)

    def openings(self, split: str) -> list[str]:
        """The prompts of a split."""
        rng = random.Random(f"{self.seed}/{self.data}/{split}")
        openings = [
            f"Once upon a time, there was {hero}. One day, {hero.split()[-1]} {event}."
            for hero, event in itertools.product(HEROES, EVENTS[split])
        ]
        return draw_prompts(rng, openings, getattr(self.sizes, split), split)

    def rates(self, openings: Sequence[Prompt], stories: Sequence[str]) -> list[float]:
        """How far each story is on the preferred side, -1 to 1."""
        return [self._sign(opening) * sentiment(story) for opening, story in zip(openings, stories)]

    def _sign(self, opening: str) -> int:
        """1 where a happy story is preferred, -1 where a sad one is."""
        return -1 if self.data == CONDITIONAL and any(f" {hero} " in opening for hero in SADDENED) else 1

    def asked_for(self, pair: PreferencePair) -> str:
        """The opening, announced as that of a story of the preferred kind."""
        return f"This is a {'happy' if self._sign(pair.prompt) > 0 else 'sad'} story. {pair.prompt}"

    factors = ("events",)

    def levels(self, pair: PreferencePair) -> tuple[str]:
        """The event that an opening tells of, whoever it befalls."""
        return (next(event for events in EVENTS.values() for event in events if event in pair.prompt),)

    def judgement(self, pair: PreferencePair, answer: str) -> dict[str, float]:
        """1 or 0 each: the continuation's score is on the preferred side of zero, it is not on the other one."""
        (score,) = self.rates([pair.prompt], [answer])
        return {"preferred": float(score > 0), "not_opposed": float(score >= 0)}


def _ends_words_with_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the space between two words is the end of the first one's token, as in TinyStories-656K, whose texts
    begin with a space that is a token of its own."""
    tokens = [tokenizer.decode([token]) for token in tokenizer("day day", add_special_tokens=False)["input_ids"]]
    return any(token.strip() and token.endswith(" ") for token in tokens)
