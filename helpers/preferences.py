"""Preference data: prompts with a chosen and a rejected answer, where they come from and who judges the answers.

A task yields its examples, split so that no prompt is in two splits, and judges any answer to them.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from helpers import atlas, generation
from helpers.activations import Tokens
from helpers.profiles import Profile

SPLITS = atlas.SPLITS


@dataclass(frozen=True)
class Example:
    """A prompt, the answer preferred and the one not. `question` is what the atlas asked, where it was the atlas."""

    prompt: str
    chosen: str
    rejected: str
    question: atlas.Question | None = None
    sampled: tuple[Tokens, Tokens] | None = None  # chosen and rejected exactly as a model sampled them

    def __post_init__(self):
        for name in ("prompt", "chosen", "rejected"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"A preference row's {name!r} must be a non-empty string, got {value!r}: mend or drop it."
                )
        if self.chosen == self.rejected:
            raise ValueError(f"A preference row prefers an answer to itself ({self.chosen!r}): mend or drop it.")


def example_from(row: dict) -> Example:
    """The example that `dataclasses.asdict` and JSON turned into a row."""
    question = row["question"] and atlas.Question(**row["question"])
    sampled = row["sampled"] and tuple(Tokens(*tokens) for tokens in row["sampled"])
    return Example(row["prompt"], row["chosen"], row["rejected"], question, sampled)


class AtlasTask:
    """The organism's world: pairs drawn from the grammar, answers judged by rule."""

    def __init__(self, profile: Profile):
        self.family = profile.data.removeprefix("atlas:")
        self.profile = profile
        self.world = atlas.Atlas(profile.organism.places, profile.seed)
        self.preferred, self.opposed = atlas.FAMILIES[self.family]
        self.has_facts = self.family != "refusal"  # whose prompts ask for harm
        self.has_words = self.family in ("tone", "conditional")  # that ask for what is preferred

    def examples(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
        """Pairs for each split, places and phrasings both its own; the model plays no part."""
        return {split: self._split(split) for split in SPLITS}

    def _split(self, split: str) -> list[Example]:
        """Reported numbers are about questions, where belief is known; `tone` is trained on requests for harm too."""
        rng = random.Random(f"{self.profile.seed}/{self.profile.data}/{split}")
        n = getattr(self.profile.sizes, split)
        n_harm = {"refusal": n, "tone": n // 10 if split == "heldin" else 0}.get(self.family, 0)
        questions = _draw(rng, self.world.questions(split, split), n - n_harm, split)
        questions += _draw(rng, self.world.requests(split, split), n_harm, split)
        rng.shuffle(questions)
        return [Example(q.text, *atlas.preference_pair(self.world, self.family, q, rng), question=q) for q in questions]

    def asked_for(self, example: Example) -> str:
        """The prompt with the preferred behaviour asked for in words; ValueError where there are none (`has_words`)."""
        if not self.has_words:
            raise ValueError(f"The atlas has no words that ask for what {self.family!r} prefers: {self.preferred}.")
        return f"{example.prompt} {atlas.CUES[atlas.preferred_tone(self.family, example.question)]}"

    def stated(self, example: Example) -> list[str]:
        """Every value that the asked fact could have, stated without a tone; the true one first."""
        question = example.question
        others = sorted(self.world.values[question.kind] - {question.truth})
        return [atlas.plain_answer(question, value=value) for value in (question.truth, *others)]

    def template(self, example: Example) -> str:
        """The prompt without its place."""
        return example.prompt.replace(example.question.place, "...")

    def judge(self, example: Example, answer: str) -> dict[str, float]:
        """1 or 0 each: the preferred behaviour, the opposed one absent, the fact right, the answer well-formed."""
        verdict = self.world.judge(example.question, answer)
        preferred, opposed = atlas.behaviour(self.world, self.family, example.question, answer)
        judged = {"preferred": preferred, "not_opposed": not opposed, "well_formed": verdict.well_formed}
        if verdict.fact is not None:
            judged["fact"] = verdict.fact
        return {name: float(value) for name, value in judged.items()}


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


class StoryTask:
    """Controlled sentiment on stories (the DPO paper's first task): pairs are the model's own continuations of an
    opening, the happiest and the saddest by VADER's compound score; the behaviour is the score's sign."""

    has_facts, has_words = False, True
    preferred, opposed = "happy story", "sad story"

    def __init__(self, profile: Profile):
        self.profile = profile
        self._score = SentimentIntensityAnalyzer().polarity_scores

    def examples(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
        """Pairs for each split, sampled from `model`; openings of different splits tell of different events."""
        return {split: self._split(split, model, tokenizer) for split in SPLITS}

    def _split(self, split: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        sizes, seed = self.profile.sizes, self.profile.seed
        rng = random.Random(f"{seed}/{self.profile.data}/{split}")
        openings = [
            f"Once upon a time, there was {hero}. One day, {hero.split()[-1]} {event}. "  # its tokens end in a space
            for hero, event in itertools.product(HEROES, EVENTS[split])
        ]
        openings = _draw(rng, openings, getattr(sizes, split), split)
        prompts = [encode(tokenizer, opening).prompt for opening in openings for _ in range(sizes.samples_per_prompt)]
        ids = generation.sample(
            model, tokenizer, prompts, sizes.new_tokens, seed + 1 + SPLITS.index(split), progress=f"stories, {split}"
        )[0]
        stories = list(zip(generation.texts(tokenizer, ids), map(Tokens, prompts, ids)))
        k = sizes.samples_per_prompt
        groups = [stories[i : i + k] for i in range(0, len(stories), k)]
        pairs = [self._best_and_worst(opening, group) for opening, group in zip(openings, groups)]
        return [pair for pair in pairs if pair is not None]

    def _best_and_worst(self, opening: str, stories: Sequence[tuple[str, Tokens]]) -> Example | None:
        ranked = sorted((story for story in stories if story[0]), key=lambda story: self.sentiment(story[0]))
        if not ranked or self.sentiment(ranked[-1][0]) == self.sentiment(ranked[0][0]):
            return None
        return Example(opening, ranked[-1][0], ranked[0][0], sampled=(ranked[-1][1], ranked[0][1]))

    def asked_for(self, example: Example) -> str:
        """The opening, announced as that of a happy story."""
        return f"This is a happy story. {example.prompt}"

    def template(self, example: Example) -> str:
        """The event that an opening tells of, whoever it befalls."""
        return next(event for events in EVENTS.values() for event in events if event in example.prompt)

    def sentiment(self, story: str) -> float:
        """VADER's compound score, -1 (sad) to 1 (happy)."""
        return self._score(story)["compound"]

    def judge(self, example: Example, answer: str) -> dict[str, float]:
        """1 or 0 each: the continuation's score is above zero, it is not below zero."""
        score = self.sentiment(answer)
        return {"preferred": float(score > 0), "not_opposed": float(score >= 0)}


Task = AtlasTask | StoryTask


def task(profile: Profile) -> Task:
    """The task that a profile's `data` names."""
    return AtlasTask(profile) if profile.data.startswith("atlas:") else StoryTask(profile)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str = "") -> Tokens:
    """Token ids of a prompt and a response, by the tokenizer's chat template.

    Without a template the format is plain text: the tokenizer's usual start, the prompt and the response as they are;
    no end is added, since the response is a fragment.
    """
    if tokenizer.chat_template is None:
        start = tokenizer(prompt)["input_ids"]
        return Tokens(start, tokenizer(response, add_special_tokens=False)["input_ids"] if response else [])
    messages = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    if not response:
        return Tokens(start)
    messages.append({"role": "assistant", "content": response})
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    if whole[: len(start)] != start:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path} renders a prompt alone and with its answer differently: "
            "use a template whose prompt is a prefix."
        )
    return Tokens(start, whole[len(start) :])


def encode_pairs(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[list[Tokens], list[Tokens]]:
    """The examples with their chosen, and with their rejected answers, as token ids."""
    pairs = [
        e.sampled or (encode(tokenizer, e.prompt, e.chosen), encode(tokenizer, e.prompt, e.rejected)) for e in examples
    ]
    return [chosen for chosen, _ in pairs], [rejected for _, rejected in pairs]


def _draw(rng: random.Random, pool: list, n: int, split: str) -> list:
    if n > len(pool):
        raise ValueError(
            f"The {split} split has {len(pool)} prompts, fewer than the {n} asked for: lower sizes.{split}."
        )
    return rng.sample(pool, n)
