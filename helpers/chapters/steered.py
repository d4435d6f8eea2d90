"""States, the direction v* that they move along, and answers with and without it.

Chapters 4 and 5 of a study (study.py); what a stage does stands in helpers/stages/.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from helpers import estimates, gradients
from helpers.chapters.subject import Subject
from helpers.lm import activations, architecture, decoding, encoding, loading
from helpers.lm.activations import POSITIONS
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.lm.steering import SteeringVector
from helpers.stages.judgements import judgements, with_ends
from helpers.stages.one_vector import one_vector
from helpers.stages.sampled import Answers, sampled, under_arms
from helpers.stages.shifts import CONTEXTS
from helpers.stages.site_choice import USUAL
from helpers.stages.states import final_states, states
from helpers.stages.tilted import nearest_vector

ANSWERED = 256  # held-in prompts whose answers by the partner v_opt is found on


class Steered(Subject):
    """A base and its partner, what moves between them, and what either says with it added or taken away. `fluency`:
    whether answers are read again for how fluent they are (stages/judgements.py)."""

    fluency = True

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

    def nearest_vector(self) -> Tensor:
        """v_opt, (d,): the constant vector at `final` that takes the base nearest to its partner in KL, on the
        partner's answers to ANSWERED held-in prompts (lm/tilts.py). Raises NoBias where logits are more than W h."""
        answered = self.answered("dpo", self.prompts("heldin")[:ANSWERED])
        return nearest_vector(*map(self.lm.role, loading.ROLES), answered, CONTEXTS, self.profile.seed)["vector"]

    def answered(self, role: str, prompts: Sequence[list[int]]) -> list[Tokens]:
        """Prompts with a model's first answers and an end to each: which, no KL depends on."""
        ends, most = encoding.ends(self.lm.tokenizer), self.profile.sizes.new_tokens
        return next(with_ends(prompts, self._sampled(role, prompts, self.profile.sizes.draws).first(), ends, most))

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
        self, role: str, site: str, deltas: Tensor, span: str = "response", split: str = "heldout", draws: int = 0,
        fluency: bool = True,
    ) -> pd.DataFrame:  # fmt: skip
        """Sampled answers to the prompts of a split with each of `deltas` added at a site, judged.

        deltas: (arms, d), or (arms, N, d) where every prompt has its own. A row an arm and a prompt, as of `answers`:
        `arm`, `prompt`, `text`, `ids` and what the task's judge says. All arms share their random numbers. draws: of
        each prompt, by default `sizes.draws`. fluency: whether that is judged too.
        """
        sizes, seed = self.profile.sizes, self.profile.seed
        prompts, drawn = self.prompts(split), (sizes.new_tokens, seed, draws or sizes.draws)
        arms = (site, deltas, span, sizes.temperature)
        return self._judged(split, under_arms(self.lm.role(role), prompts, *drawn, *arms), fluency)

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

    def _sampled(self, role: str, prompts: Sequence[list[int]], draws: int) -> Answers:
        sizes, seed = self.profile.sizes, self.profile.seed
        return sampled(self.lm.role(role), prompts, sizes.new_tokens, seed, draws, temperature=sizes.temperature)

    def _judged(self, split: str, answers: Answers, fluency: bool = True) -> pd.DataFrame:
        fluency = fluency and self.fluency
        base, most = self.lm.role("base"), self.profile.sizes.new_tokens
        return judgements(self.task, self.pairs[split], self.prompts(split), answers, most, base, fluency)
