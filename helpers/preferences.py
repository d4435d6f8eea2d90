"""Preference data: prompts with a chosen and a rejected answer, where they come from and who judges the answers.

A task yields its examples, split so that no prompt is in two splits, and judges any answer to them.
"""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers import atlas, encoding, generation, judges, metrics, models, profiles, sources
from helpers.activations import Tokens
from helpers.encoding import Message, Prompt
from helpers.profiles import Profile
from helpers.sources import Row

SPLITS = atlas.SPLITS


@dataclass(frozen=True)
class Example:
    """A prompt, the answer preferred and the one not.

    Of a conversation, `messages` are its turns and `prompt` is all of them as plain text. Of the atlas, `question` is
    what was asked and `family` what the pair is about.
    """

    prompt: str
    chosen: str
    rejected: str
    question: atlas.Question | None = None
    family: str | None = None
    sampled: tuple[Tokens, Tokens] | None = None  # chosen and rejected exactly as a model sampled them
    messages: tuple[Message, ...] | None = None

    def __post_init__(self):
        for name in ("prompt", "chosen", "rejected"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"A preference row's {name!r} must be a non-empty string, got {value!r}: mend or drop it."
                )
        if self.chosen == self.rejected:
            raise ValueError(f"A preference row prefers an answer to itself ({self.chosen!r}): mend or drop it.")

    @property
    def asked(self) -> Prompt:
        """What `encoding.encode` reads: the conversation, where the prompt is one."""
        return self.messages or self.prompt


def example_from(row: dict) -> Example:
    """The example that `dataclasses.asdict` and JSON turned into a row."""
    question = row["question"] and atlas.Question(**row["question"])
    sampled = row["sampled"] and tuple(Tokens(*tokens) for tokens in row["sampled"])
    messages = row["messages"] and tuple(map(tuple, row["messages"]))
    return Example(**{**row, "question": question, "sampled": sampled, "messages": messages})


class Drawn(NamedTuple):
    """The pairs of each split, and what became of every row that they were drawn from: {what: rows}."""

    examples: dict[str, list[Example]]
    account: dict[str, int]


class _Task:
    """What a profile's data asks for: pairs, and a judge of any answer to their prompts."""

    def judged(self, examples: Sequence[Example], answers: Sequence[str]) -> list[dict[str, float]]:
        """What the judge says of an answer to each example."""
        return [self.judge(example, answer) for example, answer in zip(examples, answers)]


class AtlasTask(_Task):
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

    def draw(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Drawn:
        """Pairs for each split, places and phrasings both its own; the model plays no part."""
        return Drawn({split: self._split(split) for split in SPLITS}, {})

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
        return dict(self._judgement(example.family, example.question, answer))

    @functools.cached_property
    def _judgement(self) -> Callable[[str, atlas.Question, str], dict[str, float]]:
        """Kept for each answer: under most doses a prompt is answered by what it was under another."""

        @functools.cache
        def of(family: str, question: atlas.Question, answer: str) -> dict[str, float]:
            verdict = self.world.judge(question, answer)
            preferred, opposed = atlas.behaviour(self.world, family, question, answer)
            judged = {"preferred": preferred, "not_opposed": not opposed, "well_formed": verdict.well_formed}
            if verdict.fact is not None and family != "belief":
                judged["fact"] = verdict.fact
            return {name: float(value) for name, value in judged.items()}

        return of


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


class StoryTask(_Task):
    """Controlled sentiment on stories (the DPO paper's first task): pairs are the model's own continuations of an
    opening, the happiest and the saddest by VADER's compound score; the behaviour is the score's sign."""

    has_facts, has_words = False, True
    sentiment = staticmethod(judges.sentiment)

    def __init__(self, profile: Profile):
        self.profile = profile
        self.is_conditional = profile.data == "onpolicy:vader-conditional"
        asked_for = ("story as asked for", "opposite story")
        self.preferred, self.opposed = asked_for if self.is_conditional else ("happy story", "sad story")

    def draw(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Drawn:
        """Pairs for each split, sampled from `model`; openings of different splits tell of different events."""
        openings = {split: self._openings(split) for split in SPLITS}
        return best_and_worst(self.profile, openings, self._rates, model, tokenizer)

    def _openings(self, split: str) -> list[str]:
        rng = random.Random(f"{self.profile.seed}/{self.profile.data}/{split}")
        openings = [
            f"Once upon a time, there was {hero}. One day, {hero.split()[-1]} {event}. "  # its tokens end in a space
            for hero, event in itertools.product(HEROES, EVENTS[split])
        ]
        return _draw(rng, openings, getattr(self.profile.sizes, split), split)

    def _rates(self, openings: Sequence[Prompt], stories: Sequence[str]) -> list[float]:
        return [self._sign(opening) * self.sentiment(story) for opening, story in zip(openings, stories)]

    def _sign(self, opening: str) -> int:
        """1 where a happy story is preferred, -1 where a sad one is."""
        return -1 if self.is_conditional and any(f" {hero} " in opening for hero in SADDENED) else 1

    def asked_for(self, example: Example) -> str:
        """The opening, announced as that of a story of the preferred kind."""
        return f"This is a {'happy' if self._sign(example.prompt) > 0 else 'sad'} story. {example.prompt}"

    def template(self, example: Example) -> str:
        """The event that an opening tells of, whoever it befalls."""
        return next(event for events in EVENTS.values() for event in events if event in example.prompt)

    def judge(self, example: Example, answer: str) -> dict[str, float]:
        """1 or 0 each: the continuation's score is on the preferred side of zero, it is not on the other one."""
        score = self._sign(example.prompt) * self.sentiment(answer)
        return {"preferred": float(score > 0), "not_opposed": float(score >= 0)}


class Score(NamedTuple):
    """A number that a judge gives an answer, as a preference: above `middle` it shows what is `preferred`, below it
    what is `opposed`; the other way round with a `sign` of -1."""

    preferred: str
    opposed: str
    judge: Callable[[Sequence[Example], Sequence[str]], np.ndarray]
    middle: float = 0.0
    sign: int = 1


def _by(name: str) -> Callable[[Sequence[Example], Sequence[str]], np.ndarray]:
    return lambda examples, answers: judges.JUDGES[name]([example.prompt for example in examples], answers)


def _closer(examples: Sequence[Example], answers: Sequence[str]) -> np.ndarray:
    """ROUGE-L to the chosen answer less that to the rejected one: no opinion, and all that pairs alone allow.

    All three are cut to as many words as the shortest has, since of texts of other lengths the likeness says which is
    nearer in length.
    """

    def closer(example: Example, answer: str) -> float:
        texts = [text.split() for text in (answer, example.chosen, example.rejected)]
        said, chosen, rejected = (" ".join(words[: min(map(len, texts))]) for words in texts)
        return metrics.rouge_l(said, chosen) - metrics.rouge_l(said, rejected)

    return np.array(list(map(closer, examples, answers)))


SCORES = {
    "closer": Score("closer to the chosen answer", "closer to the rejected answer", _closer),
    "sentiment": Score("positive answer", "negative answer", _by("sentiment")),
    "refusal": Score("refusal", "compliance", _by("refusal"), middle=0.5),
    "nontoxic": Score("non-toxic answer", "toxic answer", _by("toxicity"), middle=0.5, sign=-1),
    "geval": Score("answer scored above 3", "answer scored below 3", _by("geval"), middle=3.0),
}


class PairsTask(_Task):
    """Preferences from a file or the hub (helpers/sources.py), or the model's own answers to their prompts, the best
    and the worst by the profile's score, which judges behaviour too."""

    has_facts = has_words = False
    POOL = 8  # rows looked at for each that is asked for, of a source with more

    def __init__(self, profile: Profile):
        self.profile, self.score = profile, SCORES[profile.score]
        self.is_on_policy = profile.data.startswith("onpolicy:")
        self.preferred, self.opposed = self.score.preferred, self.score.opposed
        if self.is_on_policy and profile.score == "closer":
            others = ", ".join(name for name in SCORES if name != "closer")
            raise ValueError(f"The score 'closer' needs answers to be close to: set score to one of {others}.")

    def draw(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Drawn:
        """Pairs for each split; no dialogue's opening is in two. Rows that do not fit the model are set aside."""
        found = sources.read(profiles.source_of(self.profile.data))
        sizes = {split: getattr(self.profile.sizes, split) for split in SPLITS}
        rows = list(found.rows)
        pool = random.Random(self.profile.seed).sample(rows, min(len(rows), self.POOL * sum(sizes.values())))
        unfit = [self._unfit(row, model, tokenizer) for row in pool]
        fitting = [row for row, reason in zip(pool, unfit) if reason is None]
        set_aside = {**found.set_aside, **Counter(filter(None, unfit))}
        try:
            drawn = sources.split(replace(found, rows=tuple(fitting)), sizes, self.profile.seed)
        except ValueError as error:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in set_aside.items()) or "nothing"
            raise ValueError(f"{str(error).removesuffix('.')}; set aside: {reasons}.") from None
        account = {f"read as {found.form}": found.total, **set_aside}
        account["not drawn"] = len(rows) - len(pool) + len(fitting) - sum(sizes.values())
        if self.is_on_policy:
            asked = {split: [row.prompt for row in of_split] for split, of_split in drawn.items()}
            pairs, more = best_and_worst(self.profile, asked, self._rates, model, tokenizer)
            return Drawn(pairs, account | more)
        pairs = {split: [_example(row.prompt, row.chosen, row.rejected) for row in drawn[split]] for split in drawn}
        return Drawn(pairs, account)

    def _unfit(self, row: Row, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Why a row cannot be used with this model, if so."""
        sizes = self.profile.sizes
        most = min(sizes.longest, models.context_length(model) or sizes.longest)
        try:
            chosen, rejected = (encoding.encode(tokenizer, row.prompt, answer) for answer in (row.chosen, row.rejected))
        except ValueError:
            return "a conversation that the chat template does not take"
        answer = sizes.new_tokens if self.is_on_policy else max(len(chosen.response), len(rejected.response))
        if len(chosen.prompt) + max(answer, sizes.new_tokens) > most:
            return f"more than {most} tokens"
        return "an answer that begins the other" if _begins(chosen, rejected) else None

    def _rates(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """How far each answer is on the preferred side."""
        examples = [_example(prompt, "chosen", "rejected") for prompt in prompts]
        return self.score.sign * (self.score.judge(examples, answers) - self.score.middle)

    def template(self, example: Example) -> str:
        """The dialogue's opening."""
        return Row(example.asked, example.chosen, example.rejected).opening

    def judged(self, examples: Sequence[Example], answers: Sequence[str]) -> list[dict[str, float]]:
        """1 or 0 each: the score is on the preferred side of its middle, it is not on the other one; nan where the
        judge failed. An empty answer is on neither side."""
        given = self.score.sign * (self.score.judge(examples, answers) - self.score.middle)
        given = np.where([not answer.strip() for answer in answers], 0.0, given)
        known = np.where(np.isnan(given), np.nan, 1.0)
        return [
            {"preferred": float(preferred), "not_opposed": float(other)}
            for preferred, other in zip((given > 0) * known, (given >= 0) * known)
        ]


def best_and_worst(
    profile: Profile,
    asked: dict[str, list[Prompt]],
    rates: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> Drawn:
    """On-policy pairs: for each prompt the best and the worst of the model's own answers, as it sampled them.

    rates: how good answers to prompts are, nan where that is not known. A prompt whose answers are all as good, or
    whose worst and best answer begin alike to the end of one, makes no pair. Raises ValueError where fewer than two do.
    """
    pairs, unjudged, k = {}, 0, profile.sizes.samples_per_prompt
    for split, prompts in asked.items():
        repeated = [prompt for prompt in prompts for _ in range(k)]
        ids = [encoding.encode(tokenizer, prompt).prompt for prompt in repeated]
        answers = generation.sample(
            model, tokenizer, ids, profile.sizes.new_tokens, profile.seed + 1 + SPLITS.index(split),
            progress=f"answers to choose from, {split}",
        )[0]  # fmt: skip
        texts = generation.texts(tokenizer, answers)
        said = list(zip(rates(repeated, texts), texts, map(Tokens, ids, answers)))
        unjudged += sum(np.isnan(rate) for rate, text, _ in said if text)
        chosen = [_extremes(prompt, said[i * k : (i + 1) * k]) for i, prompt in enumerate(prompts)]
        pairs[split] = [pair for pair in chosen if pair is not None]
        if len(pairs[split]) < 2:
            raise ValueError(
                f"Of {len(prompts)} prompts of the {split} split {len(pairs[split])} have answers that the score tells "
                f"apart ({unjudged} answers were not judged): take another score, or more sizes.samples_per_prompt."
            )
    lost = sum(map(len, asked.values())) - sum(map(len, pairs.values()))
    return Drawn(pairs, {"answers that the score does not tell apart": lost, "answers not judged": int(unjudged)})


def _extremes(prompt: Prompt, said: Sequence[tuple[float, str, Tokens]]) -> Example | None:
    ranked = sorted((answer for answer in said if answer[1] and not np.isnan(answer[0])), key=lambda answer: answer[0])
    if not ranked or ranked[0][0] == ranked[-1][0] or _begins(ranked[0][2], ranked[-1][2]):
        return None
    (_, rejected, worst), (_, chosen, best) = ranked[0], ranked[-1]
    return _example(prompt, chosen, rejected, sampled=(best, worst))


def _begins(one: Tokens, other: Tokens) -> bool:
    """Whether one response is the other's beginning: then no token tells them apart."""
    shorter = min(len(one.response), len(other.response))
    return one.response[:shorter] == other.response[:shorter]


def _example(prompt: Prompt, chosen: str, rejected: str, **more) -> Example:
    if isinstance(prompt, str):
        return Example(prompt, chosen, rejected, **more)
    return Example(encoding.plain(prompt), chosen, rejected, messages=prompt, **more)


# What notebook 07 compares: preferences of different structure on one base, by where their pairs come from.
COMPARED = {
    "atlas": (
        "atlas:tone", "atlas:refusal", "atlas:conditional", "atlas:belief",
        "atlas:tone+refusal", "atlas:refusal+conditional",
    ),
    "onpolicy": ("onpolicy:vader", "onpolicy:vader-conditional"),
}  # fmt: skip


def compared(profile: Profile) -> dict[str, str]:
    """{name: data} of the preferences that notebook 07 compares with a profile's own, which come first; its own alone
    where they come from elsewhere or the partner is a ready one."""
    kind = profile.data.split(":")[0]
    if profile.dpo_model or profiles.source_of(profile.data) is not None:
        return {"pairs": profile.data}
    return {data.split(":")[1].replace("vader-", "").replace("vader", "happy"): data for data in COMPARED[kind]}


Task = AtlasTask | StoryTask | PairsTask


def task(profile: Profile) -> Task:
    """The task that a profile's `data` names."""
    if profiles.source_of(profile.data) is not None:
        return PairsTask(profile)
    return AtlasTask(profile) if profile.data.startswith("atlas:") else StoryTask(profile)


def encode_pairs(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[list[Tokens], list[Tokens]]:
    """The examples with their chosen, and with their rejected answers, as token ids."""

    def encoded(example: Example, answer: str) -> Tokens:
        return encoding.encode(tokenizer, example.asked, answer)

    pairs = [e.sampled or (encoded(e, e.chosen), encoded(e, e.rejected)) for e in examples]
    return [chosen for chosen, _ in pairs], [rejected for _, rejected in pairs]


def _draw(rng: random.Random, pool: list, n: int, split: str) -> list:
    if n > len(pool):
        raise ValueError(
            f"The {split} split has {len(pool)} prompts, fewer than the {n} asked for: lower sizes.{split}."
        )
    return rng.sample(pool, n)
