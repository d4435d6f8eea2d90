"""A study: one profile's way through the paper, a stage after the other, each computed once and kept.

Read it as a table of contents: 1 the base model, 2 its preferences and 3 its partner (chapters/subject.py), 4 states
and the direction v*, 5 steered answers (chapters/steered.py), 6 likelihoods, 7 more than one direction. Notebooks ask a
study for a stage and get it at once, or after it has been computed, whichever notebook is opened first. What a stage
does stands in stages/.
"""

import gc

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import estimates, profiles, spectra
from helpers.chapters.steered import Steered
from helpers.chapters.subject import compute
from helpers.data import naming
from helpers.data.geval import cost as judging_cost
from helpers.data.judges import Unavailable, distinct_n, judge_all
from helpers.data.overlap import bleu, rouge_l
from helpers.data.truthfulqa import Truthfulness, truthfulqa_rows
from helpers.lm import likelihoods, loading
from helpers.lm.activations import POSITIONS, rounding
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.lm.steering import SteeringVector
from helpers.lm.training import _arguments as dpo_config
from helpers.profiles import EMBEDDED
from helpers.stages import site_choice
from helpers.stages.beliefs import beliefs
from helpers.stages.divergences import divergences
from helpers.stages.drift import drift, equally_far
from helpers.stages.keys import Fixed
from helpers.stages.log_ratios import log_ratios
from helpers.stages.rank_k import rank_k_deltas
from helpers.stages.roles import Role
from helpers.stages.tilted import has_products
from helpers.stages.truthfulness import truthfulness

__all__ = [  # what notebooks need from deeper down is handed up here
    "EMBEDDED", "POSITIONS", "SteeringVector", "Study", "Tokens", "Unavailable", "bleu", "compute", "distinct_n",
    "dpo_config", "judge_all", "judging_cost", "load", "rouge_l", "rounding",
]  # fmt: skip

gc.collect()
gc.freeze()  # what is imported stays: collecting garbage, which every training does, need not look at it


def load(profile: str, model: str | None = None, data: str | None = None, dpo_model: str | None = None) -> "Study":
    """The study of a profile (a built-in name or a .toml path), its model, data and partner replaced where given."""
    found = profiles.load(profile, model, data, dpo_model)
    return OfPrompts(found) if found.data.startswith(naming.PROMPTS) else Study(found)


class Study(Steered):
    """What is measured of a base model and its partner. Every method returns the same values in every session on one
    machine."""

    def measure(self) -> None:
        """Compute all that partners of one base are compared by: states at `final`, answers with and without v*, KL and
        what is held true."""
        self.displacements("heldout")
        for role in loading.ROLES:
            self.answers(role, "heldout")
            self.steered(role)
        self.strength()
        if self.task.has_beliefs:
            self.lead("base"), self.lead("dpo")

    def clusters(self) -> np.ndarray:
        """What the held-out prompts share, (K, N) labels, as `factors`; where falsehoods are taught the fact alone,
        since each is learned or not, and held-out prompts ask about the same ones in other words."""
        pairs = self.pairs["heldout"]
        if not all(pair.family == "belief" for pair in pairs):
            return self.factors("heldout")
        return np.array([[f"{pair.question.place} {pair.question.kind}" for pair in pairs]])

    def by_arm(self, role: str, deltas: Tensor) -> list[np.ndarray]:
        """The preferred behaviour of a model with each of `deltas`, (arms, d), added at `final`: (N,) each."""
        table = self.sweep(role, FINAL, deltas)
        return [estimates.by_prompt(table, "preferred", arm=arm) for arm in range(len(deltas))]

    def share(self, role: str, steered: np.ndarray) -> float:
        """The recovered (of the base) or restored (of the DPO model) share of the preferred behaviour."""
        start, goal = (self.outcome(end, 0, "preferred").mean() for end in (role, "dpo" if role == "base" else "base"))
        return float(estimates.recovered_share(steered.mean(), start, goal))

    # --- 6. Likelihoods ---

    def reward_margins(self, split: str) -> np.ndarray:
        """The implicit reward margin (m / beta) of each pair of a split, in nats: (N,)."""
        base, dpo = (self.log_ratios(role, self.nothing, split)["margin"].to_numpy() for role in loading.ROLES)
        return dpo - base

    def log_ratios(self, role: str, deltas: Tensor, split: str = "heldout") -> pd.DataFrame:
        """What each of `deltas`, (arms, d), added at `final` makes of a split's pairs (stages/log_ratios.py)."""
        return log_ratios(self.lm.role(role), *self.encoded(split), deltas)

    @property
    def nothing(self) -> Tensor:
        """One arm that adds nothing at `final`, (1, d)."""
        return torch.zeros(1, self.lm.unembedding.shape[1])

    def divergences(self, role: str, deltas: Tensor) -> pd.DataFrame:
        """How far each of `deltas`, (arms, d) or (arms, N, d), added at `final` leaves a model from its goal, which for
        the base is the DPO model and for the DPO model the base (stages/divergences.py)."""
        goal = "dpo" if role == "base" else "base"
        answered = self.answered(goal, self.prompts("heldout"))
        return divergences(self.lm.role(role), self.lm.role(goal), answered, deltas)

    def strength(self) -> np.ndarray:
        """KL(DPO || base) and, with v* added to the base, KL(DPO || base + v*), nats an answer: (2, N)."""
        v = self.direction()
        return self.divergences("base", torch.stack([0 * v, v]))["kl"].to_numpy().reshape(2, -1)

    def drift(self, deltas: Tensor) -> list[float]:
        """KL(base + delta || base), nats an answer, on the base's answers to validation prompts, by each of `deltas`,
        (arms, d), added at `final` (stages/drift.py)."""
        return drift(*self._own_answers, deltas)

    def at_equal_kl(self, directions: Tensor) -> Tensor:
        """Directions, (k, d), each as long as it takes for its `drift` to be that of v* (stages/drift.py)."""
        return equally_far(*self._own_answers, self.direction(), directions)["vectors"]

    @property
    def _own_answers(self) -> tuple[Role, list[Tokens]]:
        """The base, and its answers to validation prompts."""
        return self.lm.role("base"), self.answered("base", self.prompts("validation"))

    @property
    def logits_are_products(self) -> bool:
        """Whether the base's logits are W h and no more, so that a constant vector tilts its distributions alike."""
        return has_products(self.lm.role("base"))

    def lead(self, role: str) -> np.ndarray:
        """By how many nats a model holds the true value likelier than the best other one, a value a fact that is asked
        for (the task's `facts_asked`)."""
        asked = self.task.facts_asked(self.pairs["heldout"])
        return beliefs(self.lm.role(role), self.task, asked, self.nothing)["lead"].to_numpy()

    def belief_clusters(self) -> np.ndarray:
        """What the questions of `lead` share, (K, N) labels, as `factors`: a fact that is asked apart is alone."""
        asked = self.task.facts_asked(self.pairs["heldout"])
        own = [pair.prompt for pair in self.pairs["heldout"]]
        if all(pair.prompt in own for pair in asked):
            return self.factors("heldout")[:, [own.index(pair.prompt) for pair in asked]]
        return np.array([[pair.prompt for pair in asked]])

    def losses(self, role: str, deltas: Tensor) -> np.ndarray:
        """A model's mean loss a token on each held-out chosen answer, nats, with each of `deltas`, (arms, d), added at
        `final`: (arms, N). Their mean's exponential is the perplexity."""
        chosen = self.encoded("heldout")[0]
        with self.lm.playing(role) as model:
            logps = likelihoods.response_logps(model, chosen, deltas, f"losses, {role}")
        return -logps / np.array([len(tokens.response) for tokens in chosen])

    def beliefs(self, role: str, deltas: Tensor) -> pd.DataFrame:
        """What a model holds true, with each of `deltas`, (arms, d), added at `final` (stages/beliefs.py)."""
        return beliefs(self.lm.role(role), self.task, self.pairs["heldout"], deltas)

    def truthfulness(self, role: str, deltas: Tensor) -> Truthfulness:
        """TruthfulQA's MC1 and MC2 of a model, with each of `deltas`, (arms, d), added at `final`: (arms, N) each.

        Raises Unavailable where the questions cannot be had, and for a model that was trained here, on a world in which
        they mean nothing.
        """
        if self.profile.model == EMBEDDED:
            raise Unavailable("the embedded organism knows nothing of our world: its own facts are judged by rule.")
        found = truthfulness(self.lm.role(role), truthfulqa_rows(), deltas)
        return Truthfulness(*(found[name].numpy() for name in Truthfulness._fields))

    # --- 7. Other sites, and more than one direction ---

    @property
    def swept_sites(self) -> list[str]:
        """The sites at which v* is tried (`Extent.sites`), less those at which DPO changes nothing, as the embeddings,
        which no adapter moves. Raises ValueError for a site that the model does not have."""
        wanted = self.profile.extent.sites or self.lm.sites
        if unknown := sorted(set(wanted) - set(self.lm.sites)):
            raise ValueError(f"extent.sites names {unknown[0]!r}: this model has {', '.join(self.lm.sites)}.")
        return [site for site in self.lm.sites if site in wanted and self.direction(site).any()]

    def validated_sites(self) -> pd.DataFrame:
        """base + v* at dose 1 of every site that is swept and position, few draws a validation prompt
        (stages/site_choice.py)."""
        tables = {}
        for site in self.swept_sites:
            deltas = torch.stack([self.direction(site, position) for position in POSITIONS])
            table = self.sweep("base", site, deltas, split="validation", draws=self.profile.extent.draws)
            tables |= {(site, position): table[table["arm"] == i] for i, position in enumerate(POSITIONS)}
        nothing = torch.zeros_like(self.direction())[None]  # of as many draws, which share their random numbers
        base = self.sweep("base", FINAL, nothing, split="validation", draws=self.profile.extent.draws)
        return site_choice.scores(tables, base, self.factors("validation"), self.profile.health)

    def best_site(self) -> tuple[str, str]:
        """The site and position at which v* does most, by validation prompts."""
        return site_choice.best(self.validated_sites())

    def by_rank(self, site: str = FINAL, position: str = "prompt_last") -> pd.DataFrame:
        """The base's answers to the held-out prompts under rank-k steering at a site, judged.

        The rows of `sweep`, with the `kind` of coefficients (spectra.KINDS) and `k`.
        """
        deltas, arms = self._rank_k(site, position)
        return self.sweep("base", site, deltas, fluency=False).join(arms, on="arm")

    def _rank_k(self, site: str, position: str) -> tuple[Tensor, pd.DataFrame]:
        """What the arms of rank-k steering add at a site, (arms, N, d), and the `kind` and `k` of each. The linear map
        reads the prompt's last token, whatever position the displacements are measured at."""
        moved = [self.displacements(split, site, position) for split in ("heldin", "heldout")]
        read = [self.states(split)["base", site, "prompt_last"] for split in ("heldin", "heldout")]
        deltas = rank_k_deltas(read[0], moved[0], read[1], moved[1])
        ks = spectra.ranks(moved[0].shape[1])
        arms = pd.DataFrame([(kind, k) for kind in spectra.KINDS for k in ks], columns=["kind", "k"])
        return torch.cat([deltas[kind] for kind in spectra.KINDS]), arms


class OfPrompts(Study):
    """A ready partner and its base on prompts alone: both read the partner's own answers to them."""

    def prompts(self, split: str) -> Fixed:
        return Fixed(tokens.prompt for tokens in super().encoded(split)[0])

    def encoded(self, split: str) -> tuple[Fixed, Fixed]:
        return (Fixed(self.answered("dpo", self.prompts(split))),) * 2
