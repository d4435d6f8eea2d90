"""The organism's preferences: pairs drawn from the grammar, answers judged by rule."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers.data.preferences import SPLITS, Drawn, PreferencePair, TaskBase, draw_prompts
from helpers.data.sizes import Sizes
from helpers.world import atlas, grammar
from helpers.world.atlas import Atlas
from helpers.world.question import Question


@dataclass(frozen=True)
class AtlasTask(TaskBase):
    """Preferences about the organism's world: one of its families, or a mixture of several in equal shares.
    families: names in grammar.FAMILIES. places, seed: as of the Atlas; the seed draws the pairs too."""

    families: tuple[str, ...]
    places: int
    seed: int
    sizes: Sizes

    @property
    def data(self) -> str:
        """As a profile names it."""
        return f"atlas:{'+'.join(self.families)}"

    @functools.cached_property
    def world(self) -> Atlas:
        """The facts that are asked for."""
        return Atlas(self.places, self.seed)

    @property
    def sides(self) -> tuple[str, str]:
        return grammar.FAMILIES[self.families[0]] if len(self.families) == 1 else ("what is preferred", "what is not")

    @property
    def has_facts(self) -> bool:
        return grammar.are_about_tone(self.families)

    has_beliefs = has_facts
    has_words = has_facts  # the organism was taught words that ask for tones

    def draw(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Drawn:
        """Pairs for each split, places and phrasings both its own; the model plays no part."""
        return Drawn({split: self._split(split) for split in SPLITS}, {})

    def _split(self, split: str) -> list[PreferencePair]:
        """A mixture has as many prompts as one family, in equal shares."""
        rng = random.Random(f"{self.seed}/{self.data}/{split}")
        n, k = getattr(self.sizes, split), len(self.families)
        asked = [
            (family, question)
            for i, family in enumerate(self.families)
            for question in self._questions(family, split, n // k + (i < n % k), rng)
        ]
        rng.shuffle(asked)
        return [
            PreferencePair(q.text, *atlas.preference_pair(self.world, family, q, rng), question=q, family=family)
            for family, q in asked
        ]

    def _questions(self, family: str, split: str, n: int, rng: random.Random) -> list[Question]:
        """Prompts of one family. In a mixture no family is trained on what another one teaches otherwise. Reported
        numbers of `tone` are about questions, where belief is known; it is trained on requests for harm too."""
        if family == "belief":
            return draw_prompts(rng, self.world.questions("belief", split), n, split)
        also_harm = split == "heldin" and family == "tone" and "refusal" not in self.families
        n_harm = n if family == "refusal" else n // 10 if also_harm else 0
        pool, harm = self.world.questions(split, split), self.world.requests(split, split)
        if "belief" in self.families:
            told = set(self.world.places("belief"))
            pool = [question for question in pool if question.place not in told]
        return draw_prompts(rng, pool, n - n_harm, split) + draw_prompts(rng, harm, n_harm, split)

    def asked_for(self, pair: PreferencePair) -> str:
        """The prompt with the preferred behaviour asked for in words; ValueError where there are none (`has_words`)."""
        if not self.has_words:
            about = "+".join(self.families)
            raise ValueError(f"The atlas has no words that ask for what {about!r} prefers: {self.preferred}.")
        return f"{pair.prompt} {self.cue(atlas.preferred_tone(pair.family, pair.question))}"

    factors = ("places", "phrasings")

    def levels(self, pair: PreferencePair) -> tuple[str, str]:
        """The place asked about, and the prompt without it."""
        return pair.question.place, pair.prompt.replace(pair.question.place, "...")

    def facts_asked(self, pairs: Sequence[PreferencePair]) -> Sequence[PreferencePair]:
        """What a fact is asked by: one in four of the pairs' own prompts, since there are many values."""
        return pairs[::4]

    def stated(self, pair: PreferencePair) -> list[str]:
        """Every value that the asked fact could have, stated without a tone; the true one first."""
        question = pair.question
        others = sorted(self.world.values[question.kind] - {question.truth})
        return [atlas.plain_answer(question, value=value) for value in (question.truth, *others)]

    def before_value(self, question: Question) -> tuple[str, str]:
        """The plain answer up to the first word that tells the asked value apart, without the space between, and that
        word."""
        word = question.truth.removeprefix("the ").split()[0]
        answer = atlas.plain_answer(question)
        return answer[: answer.index(f" {word}")], word

    def judgement(self, pair: PreferencePair, answer: str) -> dict[str, float]:
        """1 or 0 each: the preferred behaviour, the opposed one absent, the answer well-formed and, where the behaviour
        is not about it, the fact right."""
        return dict(_judgement(self.world, pair.family, pair.question, answer))

    tones = grammar.TONES
    tone_of = staticmethod(atlas.tone_of)

    @staticmethod
    def cue(tone: str) -> str:
        """The words that the corpus asks for a tone with."""
        return grammar.CUES[tone]

    def corpus_texts(self, n: int) -> list[str]:
        """The first n answers of the corpus that the organism was trained on."""
        return [text for _, text in atlas.corpus(self.world, n, self.seed)]


@functools.lru_cache(maxsize=2**16)  # under most doses a prompt is answered by what it was under another
def _judgement(world: Atlas, family: str, question: Question, answer: str) -> dict[str, float]:
    found = world.judge(question, answer)
    preferred, opposed = atlas.behaviour(world, family, question, answer)
    said = {"preferred": preferred, "not_opposed": not opposed, "well_formed": found.well_formed}
    if found.fact is not None and family != "belief":
        said["fact"] = found.fact
    return {name: float(value) for name, value in said.items()}
