"""Preferences from a file or the hub, or the model's own answers to their prompts."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from helpers.data import files, judges, naming, overlap, sources
from helpers.data.on_policy import best_and_worst
from helpers.data.preferences import SPLITS, Drawn, PreferencePair, TaskBase, begins, pair_about
from helpers.data.sizes import Sizes
from helpers.data.sources import Rows
from helpers.data.turns import Row
from helpers.lm import architecture, encoding
from helpers.lm.encoding import Prompt

POOL = 8  # rows looked at for each that is asked for, of a source with more


class Score(NamedTuple):
    """A number that a judge gives an answer, as a preference: above `middle` it shows what is preferred, below it the
    opposite; the other way round with a `sign` of -1. `sides` names both."""

    sides: tuple[str, str]
    judge: Callable[[Sequence[PreferencePair], Sequence[str]], np.ndarray]
    middle: float = 0.0
    sign: int = 1


def _by(name: str) -> Callable[[Sequence[PreferencePair], Sequence[str]], np.ndarray]:
    return lambda pairs, answers: judges.JUDGES[name]([pair.prompt for pair in pairs], answers)


def _closer(pairs: Sequence[PreferencePair], answers: Sequence[str]) -> np.ndarray:
    """ROUGE-L to the chosen answer less that to the rejected one: no opinion, and all that pairs alone allow.
    All three are cut to as many words as the shortest has, since of texts of other lengths the likeness says which is
    nearer in length."""

    def closer(pair: PreferencePair, answer: str) -> float:
        texts = [text.split() for text in (answer, pair.chosen, pair.rejected)]
        said, chosen, rejected = (" ".join(words[: min(map(len, texts))]) for words in texts)
        return overlap.rouge_l(said, chosen) - overlap.rouge_l(said, rejected)

    scored = tqdm(zip(pairs, answers), "ROUGE-L to both answers", len(answers), leave=False, delay=1)
    return np.array([closer(*one) for one in scored])


SCORES = {
    "closer": Score(("closer to the chosen answer", "closer to the rejected answer"), _closer),
    "sentiment": Score(("positive answer", "negative answer"), _by("sentiment")),
    "refusal": Score(("refusal", "compliance"), _by("refusal"), middle=0.5),
    "nontoxic": Score(("non-toxic answer", "toxic answer"), _by("toxicity"), middle=0.5, sign=-1),
    "geval": Score(("answer scored above 3", "answer scored below 3"), _by("geval"), middle=3.0),
}


@dataclass(frozen=True)
class RowsTask(TaskBase):
    """Preferences from a file or the hub (sources.py), or the model's own answers to their prompts, the best and the
    worst by a score, which judges behaviour too.

    source: as `files.content_id` and `sources.read` take it. before: naming.ON_POLICY, naming.PROMPTS or nothing.
    score: one of SCORES. judge, content: the content ids of the score's judge and of the source. Raises ValueError for
    a score that cannot choose among a model's own answers.
    """

    source: str
    before: str
    score: str
    seed: int
    sizes: Sizes
    judge: str
    content: str

    def __post_init__(self):
        if self.is_on_policy and self.score == "closer":
            others = ", ".join(name for name in SCORES if name != "closer")
            raise ValueError(f"The score 'closer' needs answers to be close to: set score to one of {others}.")

    @property
    def is_on_policy(self) -> bool:
        return self.before == naming.ON_POLICY

    @property
    def has_judge(self) -> bool:
        return self.score != "closer" or self.before != naming.PROMPTS

    @property
    def sides(self) -> tuple[str, str]:
        return SCORES[self.score].sides

    def draw(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Drawn:
        """Pairs for each split; no dialogue's opening is in two. Rows that do not fit the model are set aside.
        Raises ValueError where too few fit, and where the source has changed since the task was made."""
        if files.content_id(self.source) != self.content:
            raise ValueError(f"The data {self.source} have changed since they were looked up: load the study anew.")
        found = (sources.read_prompts if self.before else sources.read)(self.source)
        rows, account = self._split(found, model, tokenizer)
        if self.is_on_policy:
            asked = {split: [row.prompt for row in drawn] for split, drawn in rows.items()}
            pairs, more = best_and_worst(model, tokenizer, asked, self.rates, self.sizes, self.seed)
            return Drawn(pairs, account | more)
        pairs = {split: [pair_about(row.prompt, row.chosen, row.rejected) for row in rows[split]] for split in rows}
        return Drawn(pairs, account)

    def _split(
        self, found: Rows, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, list[Row]], dict[str, int]]:
        """The rows of each split, and what became of every row."""
        sizes = {split: getattr(self.sizes, split) for split in SPLITS}
        pool = random.Random(self.seed).sample(found.rows, min(len(found.rows), POOL * sum(sizes.values())))
        unfit = [self.unfit(row, model, tokenizer) for row in tqdm(pool, "rows that fit", leave=False, delay=1)]
        fitting = [row for row, reason in zip(pool, unfit) if reason is None]
        set_aside = Counter(filter(None, unfit))
        try:
            drawn = sources.split(replace(found, rows=tuple(fitting)), sizes, self.seed)
        except ValueError as error:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in (found.set_aside | set_aside).items()) or "nothing"
            raise ValueError(f"{str(error).removesuffix('.')}; set aside: {reasons}.") from None
        not_drawn = len(found.rows) - len(pool) + len(fitting) - sum(sizes.values())
        return drawn, {**found.account, **set_aside, "not drawn": not_drawn}

    def unfit(self, row: Row, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Why a row cannot be used with a model; None where it can."""
        most = min(self.sizes.longest, architecture.context_length(model) or self.sizes.longest)
        try:
            chosen, rejected = (encoding.encode(tokenizer, row.prompt, answer) for answer in (row.chosen, row.rejected))
        except encoding.Unencodable as error:
            return error.reason
        if len(chosen.prompt) + max(len(chosen.response), len(rejected.response), self.sizes.new_tokens) > most:
            return f"more than {most} tokens"
        return "an answer that begins the other" if not self.before and begins(chosen, rejected) else None

    factors = ("openings",)

    def levels(self, pair: PreferencePair) -> tuple[str]:
        """The dialogue's opening."""
        return (Row(pair.asked, pair.chosen, pair.rejected).opening,)

    def rates(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """How far each answer is on the preferred side, (N,); nan where the judge failed."""
        return self._margins([pair_about(prompt, "chosen", "rejected") for prompt in prompts], answers)

    def _margins(self, pairs: Sequence[PreferencePair], answers: Sequence[str]) -> np.ndarray:
        score = SCORES[self.score]
        return score.sign * (score.judge(pairs, answers) - score.middle)

    def judgements(self, pairs: Sequence[PreferencePair], answers: Sequence[str]) -> list[dict[str, float]]:
        """1 or 0 each: the score is on the preferred side of its middle, it is not on the other one; nan where the
        judge failed. An empty answer is on neither side."""
        given = np.where([not answer.strip() for answer in answers], 0.0, self._margins(pairs, answers))
        known = np.where(np.isnan(given), np.nan, 1.0)
        return [
            {"preferred": float(preferred), "not_opposed": float(other)}
            for preferred, other in zip((given > 0) * known, (given >= 0) * known)
        ]
