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
    """A prompt, the answer preferred and the one not. Of the atlas, `question` is what was asked and `family` what the
    pair is about."""

    prompt: str
    chosen: str
    rejected: str
    question: atlas.Question | None = None
    family: str | None = None
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
    return Example(**{**row, "question": question, "sampled": sampled})


class AtlasTask:
    """The organism's world: pairs drawn from the grammar, answers judged by rule."""

    def __init__(self, profile: Profile):
        self.families = tuple(profile.data.removeprefix("atlas:").split("+"))
        self.profile = profile
        self.world = atlas.Atlas(profile.organism.places, profile.seed)
        mixed = ("what is preferred", "what is not")
        self.preferred, self.opposed = mixed if len(self.families) > 1 else atlas.FAMILIES[self.families[0]]
        about_tone = set(self.families) <= {"tone", "conditional"}
        self.has_facts = about_tone  # known by rule, and none of the preference's business
        self.has_words = about_tone  # that ask for what is preferred

    def examples(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
        """Pairs for each split, places and phrasings both its own; the model plays no part."""
        return {split: self._split(split) for split in SPLITS}

    def _split(self, split: str) -> list[Example]:
        """A mixture has as many prompts as one family, in equal shares."""
        rng = random.Random(f"{self.profile.seed}/{self.profile.data}/{split}")
        n, k = getattr(self.profile.sizes, split), len(self.families)
        asked = [
            (family, question)
            for i, family in enumerate(self.families)
            for question in self._questions(family, split, n // k + (i < n % k), rng)
        ]
        rng.shuffle(asked)
        return [
            Example(q.text, *atlas.preference_pair(self.world, family, q, rng), question=q, family=family)
            for family, q in asked
        ]

    def _questions(self, family: str, split: str, n: int, rng: random.Random) -> list[atlas.Question]:
        """Prompts of one family. In a mixture no family is trained on what another one teaches otherwise.

        Reported numbers of `tone` are about questions, where belief is known; it is trained on requests for harm too.
        """
        if family == "belief":
            return _draw(rng, self.world.questions("belief", split), n, split)
        also_harm = split == "heldin" and family == "tone" and "refusal" not in self.families
        n_harm = n if family == "refusal" else n // 10 if also_harm else 0
        pool = self.world.questions(split, split)
        if "belief" in self.families:
            told = set(self.world.places("belief"))
            pool = [question for question in pool if question.place not in told]
        return _draw(rng, pool, n - n_harm, split) + _draw(rng, self.world.requests(split, split), n_harm, split)

    def asked_for(self, example: Example) -> str:
        """The prompt with the preferred behaviour asked for in words; ValueError where there are none (`has_words`)."""
        if not self.has_words:
            about = "+".join(self.families)
            raise ValueError(f"The atlas has no words that ask for what {about!r} prefers: {self.preferred}.")
        return f"{example.prompt} {atlas.CUES[atlas.preferred_tone(example.family, example.question)]}"

    def stated(self, example: Example) -> list[str]:
        """Every value that the asked fact could have, stated without a tone; the true one first."""
        question = example.question
        others = sorted(self.world.values[question.kind] - {question.truth})
        return [atlas.plain_answer(question, value=value) for value in (question.truth, *others)]

    def template(self, example: Example) -> str:
        """The prompt without its place."""
        return example.prompt.replace(example.question.place, "...")

    def judge(self, example: Example, answer: str) -> dict[str, float]:
        """1 or 0 each: the preferred behaviour, the opposed one absent, the answer well-formed and, where the behaviour
        is not about it, the fact right."""
        verdict = self.world.judge(example.question, answer)
        preferred, opposed = atlas.behaviour(self.world, example.family, example.question, answer)
        judged = {"preferred": preferred, "not_opposed": not opposed, "well_formed": verdict.well_formed}
        if verdict.fact is not None and example.family != "belief":
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


SADDENED = ("little boy", "big dog", "brown bunny")  # whose stories `vader-conditional` prefers sad


class StoryTask:
    """Controlled sentiment on stories (the DPO paper's first task): pairs are the model's own continuations of an
    opening, the happiest and the saddest by VADER's compound score; the behaviour is the score's sign."""

    has_facts, has_words = False, True

    def __init__(self, profile: Profile):
        self.profile = profile
        self.is_conditional = profile.data == "onpolicy:vader-conditional"
        asked_for = ("story as asked for", "opposite story")
        self.preferred, self.opposed = asked_for if self.is_conditional else ("happy story", "sad story")
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
        sign = self._sign(opening)
        ranked = sorted((story for story in stories if story[0]), key=lambda story: sign * self.sentiment(story[0]))
        if not ranked or self.sentiment(ranked[-1][0]) == self.sentiment(ranked[0][0]):
            return None
        return Example(opening, ranked[-1][0], ranked[0][0], sampled=(ranked[-1][1], ranked[0][1]))

    def _sign(self, opening: str) -> int:
        """1 where a happy story is preferred, -1 where a sad one is."""
        return -1 if self.is_conditional and any(f" {hero} " in opening for hero in SADDENED) else 1

    def asked_for(self, example: Example) -> str:
        """The opening, announced as that of a story of the preferred kind."""
        return f"This is a {'happy' if self._sign(example.prompt) > 0 else 'sad'} story. {example.prompt}"

    def template(self, example: Example) -> str:
        """The event that an opening tells of, whoever it befalls."""
        return next(event for events in EVENTS.values() for event in events if event in example.prompt)

    def sentiment(self, story: str) -> float:
        """VADER's compound score, -1 (sad) to 1 (happy)."""
        return self._score(story)["compound"]

    def judge(self, example: Example, answer: str) -> dict[str, float]:
        """1 or 0 each: the continuation's score is on the preferred side of zero, it is not on the other one."""
        score = self._sign(example.prompt) * self.sentiment(answer)
        return {"preferred": float(score > 0), "not_opposed": float(score >= 0)}


# What notebook 07 compares: preferences of different structure on one base, by where their pairs come from.
COMPARED = {
    "atlas": (
        "atlas:tone", "atlas:refusal", "atlas:conditional", "atlas:belief",
        "atlas:tone+refusal", "atlas:refusal+conditional",
    ),
    "onpolicy": ("onpolicy:vader", "onpolicy:vader-conditional"),
}  # fmt: skip

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
