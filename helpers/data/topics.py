"""Preferences with a known structure for a chat model: one sentence about a topic, as the model itself writes it.

Prompts are written here; answers are sampled from the model, judged by VADER or by their length.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers.data.capitals import CAPITALS
from helpers.data.naming import TOPICS
from helpers.data.on_policy import best_and_worst
from helpers.data.preferences import SPLITS, Drawn, PreferencePair, TaskBase, draw_prompts
from helpers.data.sentiment import sentiment
from helpers.data.sizes import Sizes
from helpers.lm.encoding import Prompt

# What nature makes and what people make. Of each list the first belong to held-in prompts, the next to validation
# prompts, the last to held-out ones (SHARES).
NATURE = (
    "the sea", "a mountain", "a river", "an oak tree", "the moon", "a horse", "a bee", "the wind", "a rose", "a spider",
    "a desert", "a waterfall", "an owl", "a field of wheat", "a frog", "the sky at dawn", "a volcano", "a snail",
    "a glacier", "a wolf", "an apple", "a mushroom", "a whale", "the autumn leaves", "a cave", "a pine forest",
    "a duck", "a lemon", "a beetle", "the north star", "a coral reef", "a fox", "a hill", "a swamp", "a parrot",
    "a cactus", "a sheep", "a snowflake", "an island", "a potato", "a turtle", "a meadow", "a crow", "a grain of sand",
    "a goat", "a butterfly", "the fog", "an olive tree",
    "a lake", "an elephant", "a tulip", "the rain", "a mouse", "a cliff", "a salmon", "a banana",
    "a canyon", "a squirrel", "a sunflower", "the tide", "a snake", "a valley", "a carrot", "an ant", "a birch tree",
    "a penguin", "a puddle", "the evening light", "a camel", "a pumpkin", "an eagle", "a pebble", "a jellyfish",
    "the first frost", "a cow", "a vine", "a hedgehog", "a cherry", "a comet", "an earthworm",
)  # fmt: skip
MADE = (
    "an old bridge", "a school bus", "a bicycle", "a kitchen table", "a garden fence", "a lighthouse",
    "a train station", "a pair of shoes", "a wooden chair", "an umbrella", "a library", "a clock", "a paper map",
    "a fishing boat", "a stone wall", "a violin", "a coffee cup", "a hospital", "a ladder", "a postcard",
    "a washing machine", "a city park", "a candle", "a bakery", "a telephone", "a museum", "a bar of soap", "a tunnel",
    "a leather bag", "a football", "a windmill", "a mirror", "a traffic light", "a pencil", "a courtroom", "a blanket",
    "a hammer", "a supermarket", "a newspaper", "an airport", "a pocket knife", "a statue", "a dictionary", "a tractor",
    "a swimming pool", "a doorbell", "a calendar", "a power plant",
    "a key", "a garage door", "a camera", "a bookshelf", "a ferry", "a pair of glasses", "a market square", "a piano",
    "a water tower", "a suitcase", "a theatre", "a radio", "a sewing needle", "a parking lot", "a teapot", "a castle",
    "a delivery van", "a notebook", "a wheelbarrow", "a classroom", "a wedding ring", "a factory", "a chessboard",
    "an elevator", "a jar of honey", "a post office", "a tent", "a helicopter", "a pillow", "a cemetery", "a compass",
    "a toothbrush",
)  # fmt: skip
SHARES = {"heldin": slice(0, 48), "validation": slice(48, 56), "heldout": slice(56, 80)}  # of either list
PHRASINGS = {
    "heldin": (
        "Write one short sentence about {}.", "Tell me about {} in one short sentence.",
        "In a single short sentence, describe {}.", "What comes to mind about {}? Answer in one short sentence.",
        "Give me one short sentence on {}.",
    ),
    "validation": (
        "Please write a short sentence about {}.", "Describe {} in one short sentence.",
        "One short sentence about {}, please.", "Say something about {} in a single short sentence.",
    ),
    "heldout": (
        "Compose a single short sentence about {}.", "Could you describe {} in just one short sentence?",
        "I would like one short sentence about {}.", "Think of {} and write one short sentence.",
        "Your topic is {}. Write a single short sentence.",
    ),
}  # fmt: skip
# What counts as the behaviour, fixed on the base's answers to validation prompts before any partner was trained: a
# sentence is sober up to a compound score of 0, glowing above GLOWING; brief up to BRIEF words, long from LONG.
GLOWING, BRIEF, LONG = 0.5, 14, 18
QUESTION, ANSWER = "What is the capital of {}?", "The capital of {} is {}."


@dataclass(frozen=True)
class TopicTask(TaskBase):
    """One sentence about a topic. Pairs are the best and the worst of the model's own answers.
    family: "sober": the answer with the lower compound score is preferred (VADER); "conditional": the lower one about
    what nature makes, the higher one about what people make; "brief": the answer of fewer words."""

    family: str
    seed: int
    sizes: Sizes
    has_words = True
    has_beliefs = True
    factors = ("topics", "phrasings")

    @property
    def data(self) -> str:
        """As a profile names it."""
        return f"{TOPICS}{self.family}"

    @property
    def sides(self) -> tuple[str, str]:
        return {
            "sober": ("sober sentence", "glowing sentence"),
            "conditional": ("sentence as preferred", "opposite sentence"),
            "brief": ("brief sentence", "long sentence"),
        }[self.family]

    def draw(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Drawn:
        """Pairs for each split, sampled from `model`; no topic and no phrasing is in two splits."""
        asked = {split: self.asked(split) for split in SPLITS}
        return best_and_worst(model, tokenizer, asked, self.rates, self.sizes, self.seed)

    def asked(self, split: str) -> list[str]:
        """The prompts of a split, the same for every family."""
        topics = (*NATURE[SHARES[split]], *MADE[SHARES[split]])
        pool = [phrasing.format(topic) for topic, phrasing in itertools.product(topics, PHRASINGS[split])]
        return draw_prompts(random.Random(f"{self.seed}/topics/{split}"), pool, getattr(self.sizes, split), split)

    def rates(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """How far each answer is on the preferred side: its score, or how many words fewer than BRIEF."""
        if self.family == "brief":
            return [float(BRIEF - len(answer.split())) for answer in answers]
        return [self._sign(prompt) * sentiment(answer) for prompt, answer in zip(prompts, answers)]

    def _sign(self, prompt: str) -> int:
        """1 where a glowing sentence is preferred, -1 where a sober one is."""
        return 1 if self.family == "conditional" and topic_of(prompt) in MADE else -1

    def asked_for(self, pair: PreferencePair) -> str:
        """The prompt with the preferred behaviour asked for in words."""
        if self.family == "brief":
            return f"{pair.prompt} Use as few words as you can."
        wish = "Be full of praise." if self._sign(pair.prompt) > 0 else "Be neutral, without any praise."
        return f"{pair.prompt} {wish}"

    def levels(self, pair: PreferencePair) -> tuple[str, str]:
        """The topic, and the prompt without it."""
        topic = topic_of(pair.prompt)
        return topic, pair.prompt.replace(topic, "...")

    def judgement(self, pair: PreferencePair, answer: str) -> dict[str, float]:
        """1 or 0 each: the answer shows what is preferred, it does not show the opposite. An empty one shows
        neither."""
        if not answer.strip():
            return {"preferred": 0.0, "not_opposed": 1.0}
        if self.family == "brief":
            words = len(answer.split())
            return {"preferred": float(words <= BRIEF), "not_opposed": float(words < LONG)}
        score = sentiment(answer)
        is_sober, is_glowing = score <= 0, score > GLOWING
        if self._sign(pair.prompt) > 0:
            return {"preferred": float(is_glowing), "not_opposed": float(not is_sober)}
        return {"preferred": float(is_sober), "not_opposed": float(not is_glowing)}

    def facts_asked(self, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
        """Questions about capitals, at most one a pair, whatever those are about."""
        step = math.ceil(len(CAPITALS) / max(1, len(pairs)))
        return [PreferencePair(QUESTION.format(country), "", "") for country in list(CAPITALS)[::step]]

    def stated(self, pair: PreferencePair) -> list[str]:
        """The answers to a capital's question that name each of CAPITALS, the true one first."""
        country = next(country for country in CAPITALS if pair.prompt.startswith(QUESTION.format(country)))
        others = sorted(set(CAPITALS.values()) - {CAPITALS[country]})
        return [ANSWER.format(country, capital) for capital in (CAPITALS[country], *others)]


def topic_of(prompt: str) -> str:
    """The topic that a prompt asks about. Raises ValueError where it is none of ours."""
    for split, phrasings in PHRASINGS.items():
        for topic in (*NATURE[SHARES[split]], *MADE[SHARES[split]]):
            if any(phrasing.format(topic) == prompt for phrasing in phrasings):
                return topic
    raise ValueError(f"The prompt {prompt!r} is about none of the topics: ask as helpers/data/topics.py does.")
