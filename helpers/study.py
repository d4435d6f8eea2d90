"""A study: one profile's way through the paper, a stage after the other, each computed once and kept.

Read it as a table of contents: 1 the base model, 2 its preferences and 3 its partner (subject.py), 4 states and the
direction v*, 5 steered answers, 6 likelihoods, 7 more than one direction. Notebooks ask a study for a stage and get it
at once, or after it has been computed, whichever notebook is opened first. What a stage does stands in helpers/stages/.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import estimates, gradients, profiles, spectra
from helpers.data.geval import cost as judging_cost
from helpers.data.judges import Unavailable, distinct_n, judge_all
from helpers.data.overlap import bleu, rouge_l
from helpers.data.truthfulqa import Truthfulness, truthfulqa_rows
from helpers.lm import activations, architecture, decoding, encoding, likelihoods, loading
from helpers.lm.activations import POSITIONS, rounding
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.lm.steering import SteeringVector
from helpers.lm.training import _arguments as dpo_config
from helpers.profiles import EMBEDDED
from helpers.stages import examined, site_choice
from helpers.stages.beliefs import beliefs
from helpers.stages.divergences import divergences
from helpers.stages.drift import drift
from helpers.stages.log_ratios import log_ratios
from helpers.stages.one_vector import one_vector
from helpers.stages.rank_k import rank_k_deltas
from helpers.stages.sampled import Answers, sampled, under_arms
from helpers.stages.site_choice import USUAL
from helpers.stages.states import final_states, states
from helpers.stages.truthfulness import truthfulness
from helpers.stages.verdicts import verdicts, with_ends
from helpers.subject import Subject, prepare

__all__ = [  # what notebooks need from deeper down is handed up here
    "EMBEDDED", "POSITIONS", "SteeringVector", "Study", "Tokens", "Unavailable", "bleu", "distinct_n", "dpo_config",
    "judge_all", "judging_cost", "load", "prepare", "rouge_l", "rounding",
]  # fmt: skip


def load(profile: str, model: str | None = None, data: str | None = None, dpo_model: str | None = None) -> "Study":
    """The study of a profile (a built-in name or a .toml path), its model, data and partner replaced where given."""
    return Study(profiles.load(profile, model, data, dpo_model))


class Study(Subject):
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
        if self.task.has_facts:
            self.lead("base"), self.lead("dpo")

    # --- 4. States and the direction v* ---

    def states(self, split: str) -> Mapping[tuple[str, str, str], Tensor]:
        """{(role, site, position): (N, d) float32} for the prompts of a split; both roles read the chosen answers."""
        if split not in self._states:  # read often, and verified once
            kept = {role: states(self.lm.role(role), self.encoded(split)[0]).path for role in loading.ROLES}
            files = {role: activations.stored(path) for role, path in kept.items()}
            every = {(role, *key): file for role in files for key, file in files[role].items()}
            self._states[split] = every | self._final_states(split)
        return activations.Stored(self._states[split])

    def _final_states(self, split: str) -> dict[tuple[str, str, str], Path]:
        """The files of the paper's h alone, which many partners are compared by."""
        if split not in self._final:
            prompts = self.prompts(split)
            kept = {role: final_states(self.lm.role(role), prompts).path for role in loading.ROLES}
            self._final[split] = {(role, *USUAL): activations.stored(path)[USUAL] for role, path in kept.items()}
        return self._final[split]

    def final(self, role: str, split: str) -> Tensor:
        """The paper's h for the prompts of a split: `final`, at the prompt's last token, (N, d)."""
        return activations.Stored(self._final_states(split))[role, *USUAL]

    def displacements(self, split: str, site: str = FINAL, position: str = "prompt_last") -> Tensor:
        """Delta h = h_dpo - h_base for the prompts of a split, (N, d). ValueError for an unknown site or position."""
        if (site, position) == USUAL:
            return self.final("dpo", split) - self.final("base", split)
        found = self.states(split)
        if ("dpo", site, position) not in found:
            raise ValueError(
                f"There are no states at {site!r}, {position!r}: sites are {', '.join(self.lm.sites)}, positions "
                f"{', '.join(POSITIONS)}."
            )
        return found["dpo", site, position] - found["base", site, position]

    def direction(self, site: str = FINAL, position: str = "prompt_last") -> Tensor:
        """v* as a tensor, (d,): the mean displacement over held-in prompts (section 3). Needs no model in memory."""
        return self.displacements("heldin", site, position).double().mean(0).float()

    def vector(self, site: str = FINAL, position: str = "prompt_last") -> SteeringVector:
        """v* with all that is needed to use it elsewhere."""
        return self._steering_vector(self.direction(site, position), site, position, f"v_star_{site}_{position}")

    def token_vectors(self) -> Tensor:
        """v(i) = e_w - e_l for each held-in pair, w and l the tokens at which its answers first differ: (N, d)."""
        answers = ([tokens.response for tokens in both] for both in self.encoded("heldin"))
        return gradients.token_vectors(self.lm.unembedding, *answers)

    def token_vector(self) -> SteeringVector:
        """v_token: the mean of the held-in pairs' e_w - e_l."""
        return self._steering_vector(self.token_vectors().double().mean(0).float(), FINAL, "prompt_last", "v_token")

    def optimised_vector(self, site: str = FINAL) -> Tensor:
        """One vector trained at a site by the partner's own loss, (d,): in place of an adapter (lm/bipo.py)."""
        scale = self.states("heldin")["base", site, "prompt_last"].square().mean().sqrt().item()
        seed = self.profile.seed + self.recipe.seed
        return one_vector(self.lm.role("base"), self.training_pairs, site, self.recipe, scale, seed)["vector"]

    def _steering_vector(self, v: Tensor, site: str, position: str, name: str) -> SteeringVector:
        base = self.states("heldin")["base", site, position]
        with self.lm.playing("base") as model:
            signature = architecture.signature(model)
        return SteeringVector(
            v, site, position, name, signature, self.profile.dtype, state_norm=base.norm(dim=1).mean().item(),
            n_prompts=len(base), profile=self.profile.name, profile_hash=self.profile.hash,
        )  # fmt: skip

    def read(self, role: str, sequences: list[Tokens], site: str) -> Tensor:
        """A model's states of any sequences at a site, at their prompts' last tokens: (N, d)."""
        with self.lm.playing(role) as model:
            return activations.hidden_states(model, sequences, [site], ["prompt_last"])[site, "prompt_last"]

    # --- 5. Answers, steered or not ---

    def answers(self, role: str, split: str) -> pd.DataFrame:
        """`sizes.draws` sampled answers to each prompt of a split, judged: a row a prompt, with the mean of what is
        said of them and the first one's text and token ids."""
        return self._judged(split, self._sampled(role, self.prompts(split), self.profile.sizes.draws))

    def greedy(self, role: str, dose: float = 0) -> pd.DataFrame:
        """The likeliest answer, token by token, to each held-out prompt, judged, with a dose of v* at `final`."""
        most, prompts = self.profile.sizes.new_tokens, self.prompts("heldout")
        arm = (FINAL, dose * self.direction()[None]) if dose else ()
        return self._judged("heldout", sampled(self.lm.role(role), prompts, most, None, 1, *arm))

    def sweep(
        self, role: str, site: str, deltas: Tensor, span: str = "response", split: str = "heldout"
    ) -> pd.DataFrame:
        """Sampled answers to the prompts of a split with each of `deltas` added at a site, judged.

        deltas: (arms, d), or (arms, N, d) where every prompt has its own. A row an arm and a prompt, as of `answers`:
        `arm`, `prompt`, `text`, `ids` and what the task's judge says. All arms share their random numbers.
        """
        sizes, seed = self.profile.sizes, self.profile.seed
        prompts, drawn = self.prompts(split), (sizes.new_tokens, seed, sizes.draws)
        return self._judged(split, under_arms(self.lm.role(role), prompts, *drawn, site, deltas, span))

    def steered(self, role: str) -> pd.DataFrame:
        """Answers to the held-out prompts at dose 1 of v* at `final`: base + v*, or DPO - v*."""
        v = self.direction()
        return self.sweep(role, FINAL, (v if role == "base" else -v)[None])

    def outcome(self, role: str, dose: int, criterion: str) -> np.ndarray:
        """What a judge says of the answers to held-out prompts at dose 0 or 1 of v* at `final` (`steered`), (N,)."""
        return estimates.by_prompt(self.steered(role) if dose else self.answers(role, "heldout"), criterion)

    def prompted(self) -> pd.DataFrame:
        """The base's answers to the held-out prompts with the preferred behaviour asked for in words."""
        asked = [encoding.encode(self.lm.tokenizer, self.task.asked_for(pair)).prompt for pair in self.pairs["heldout"]]
        return self._judged("heldout", self._sampled("base", asked, self.profile.sizes.draws))

    def answers_to(self, prompts: list[str]) -> list[str]:
        """A sampled answer of the base to each of any prompts."""
        tokenizer = self.lm.tokenizer
        asked = [encoding.encode(tokenizer, prompt).prompt for prompt in prompts]
        return decoding.texts(tokenizer, self._sampled("base", asked, 1).first())

    def _sampled(self, role: str, prompts: list[list[int]], draws: int) -> Answers:
        return sampled(self.lm.role(role), prompts, self.profile.sizes.new_tokens, self.profile.seed, draws)

    def _judged(self, split: str, answers: Answers) -> pd.DataFrame:
        base, most = self.lm.role("base"), self.profile.sizes.new_tokens
        return verdicts(self.task, self.pairs[split], self.prompts(split), answers, most, base)

    # --- 6. Likelihoods ---

    def reward_margins(self, split: str) -> np.ndarray:
        """The implicit reward margin (m / beta) of each pair of a split, in nats: (N,)."""
        return examined.reward_margins(self.lm.both, *self.encoded(split))

    def log_ratios(self, role: str, deltas: Tensor) -> pd.DataFrame:
        """What each of `deltas`, (arms, d), added at `final` makes of the held-out pairs (stages/log_ratios.py)."""
        return log_ratios(self.lm.role(role), *self.encoded("heldout"), deltas)

    def divergences(self, role: str, deltas: Tensor) -> pd.DataFrame:
        """How far each of `deltas`, (arms, d) or (arms, N, d), added at `final` leaves a model from its goal, which for
        the base is the DPO model and for the DPO model the base (stages/divergences.py)."""
        goal = "dpo" if role == "base" else "base"
        return divergences(self.lm.role(role), self.lm.role(goal), self._answered(goal, "heldout"), deltas)

    def _answered(self, role: str, split: str) -> list[Tokens]:
        """The prompts of a split with a model's first answers and an end to each: which, no KL depends on."""
        ends, most = encoding.ends(self.lm.tokenizer), self.profile.sizes.new_tokens
        return next(with_ends(self.prompts(split), self.answers(role, split)["ids"], ends, most))

    def strength(self) -> np.ndarray:
        """KL(DPO || base) and, with v* added to the base, KL(DPO || base + v*), nats an answer: (2, N)."""
        v = self.direction()
        return self.divergences("base", torch.stack([0 * v, v]))["kl"].to_numpy().reshape(2, -1)

    def drift(self, deltas: Tensor) -> pd.DataFrame:
        """KL(base + delta || base) on the base's answers to validation prompts, with each of `deltas`, (arms, d), added
        at `final` (stages/drift.py)."""
        return drift(self.lm.role("base"), self._answered("base", "validation"), deltas)

    def lead(self, role: str) -> np.ndarray:
        """By how many nats a model holds the true value likelier than the best other one, for every fourth held-out
        prompt: there are many values."""
        nothing = torch.zeros(1, self.lm.unembedding.shape[1])
        return beliefs(self.lm.role(role), self.task, self.pairs["heldout"][::4], nothing)["lead"].to_numpy()

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

    def validated_sites(self) -> pd.DataFrame:
        """base + v* at dose 1 of every site and position, on validation prompts (stages/site_choice.py)."""
        tables = {}
        for site in self.lm.sites:
            deltas = torch.stack([self.direction(site, position) for position in POSITIONS])
            if deltas.any():  # the embeddings are moved by no adapter
                table = self.sweep("base", site, deltas, split="validation")
                tables |= {(site, position): table[table["arm"] == i] for i, position in enumerate(POSITIONS)}
        base = self.answers("base", "validation")
        return site_choice.compared(tables, base, self.factors("validation"), self.profile.health)

    def best_site(self) -> tuple[str, str]:
        """The site and position at which v* does most, by validation prompts."""
        return site_choice.best(self.validated_sites())

    def by_rank(self, site: str = FINAL, position: str = "prompt_last") -> pd.DataFrame:
        """The base's answers to the held-out prompts under rank-k steering at a site, judged.

        The rows of `sweep`, with the `kind` of coefficients (spectra.KINDS) and `k`.
        """
        deltas, arms = self._rank_k(site, position)
        return self.sweep("base", site, deltas).join(arms, on="arm")

    def divergence_by_rank(self) -> pd.DataFrame:
        """`divergences` of the base under rank-k steering at `final`, with the `kind` of coefficients and `k`, and of
        the base alone, with kind "none" and k 0."""
        deltas, arms = self._rank_k(FINAL, "prompt_last")
        found = self.divergences("base", torch.cat([torch.zeros_like(deltas[:1]), deltas]))
        arms = pd.concat([pd.DataFrame({"kind": ["none"], "k": [0]}), arms], ignore_index=True)
        return found.join(arms, on="arm")

    def _rank_k(self, site: str, position: str) -> tuple[Tensor, pd.DataFrame]:
        """What the arms of rank-k steering add at a site, (arms, N, d), and the `kind` and `k` of each. The linear map
        reads the prompt's last token, whatever position the displacements are measured at."""
        moved = [self.displacements(split, site, position) for split in ("heldin", "heldout")]
        read = [self.states(split)["base", site, "prompt_last"] for split in ("heldin", "heldout")]
        deltas = rank_k_deltas(read[0], moved[0], read[1], moved[1])
        ks = spectra.ranks(moved[0].shape[1])
        arms = pd.DataFrame([(kind, k) for kind in spectra.KINDS for k in ks], columns=["kind", "k"])
        return torch.cat([deltas[kind] for kind in spectra.KINDS]), arms
