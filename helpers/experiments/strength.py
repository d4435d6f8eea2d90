"""Partners along their run: what holds of one at which strength, and what is compared at equal strength.

The strength of a partner is KL(partner || base), nats an answer. A run is one training, whose partner is kept at
several stops; every property of it is a curve over strength.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import spectra
from helpers.data.preferences import PreferencePair
from helpers.lm.recipe import STOPS, Recipe
from helpers.lm.training import TrainingPair
from helpers.profiles import Profile
from helpers.stages.keys import Fixed
from helpers.study import Study

DOSES = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0])  # tried on the way from the DPO model to the base
RANDOM = 20  # directions, of which the largest effect is a control
EVERY = {"heldin": 4, "validation": 4}  # which prompts a checkpoint is measured on, of the held-out ones `Extent.every`
GREEDY = {"base": ("base", 0), "DPO": ("dpo", 0), "base + v*": ("base", 1), "DPO − v*": ("dpo", -1)}
HELD = 0.95  # of the preference vectors' squared norm: what their span holds


class Checkpoint(Study):
    """A partner at one stop of its run, measured on a part of the prompts (EVERY), since there are many of them. It was
    trained on all."""

    fluency = False

    @cached_property
    def pairs(self) -> dict[str, Sequence[PreferencePair]]:
        """The pairs that it is measured on, by split."""
        every = EVERY | {"heldout": self.profile.extent.every}
        return {split: Fixed(kept[:: every[split]]) for split, kept in super().pairs.items()}

    @cached_property
    def training_pairs(self) -> Sequence[TrainingPair]:
        """All held-in pairs."""
        return Study(self.profile).training_pairs

    @cached_property
    def first(self) -> "Checkpoint":
        """The partner after the first step of the same run."""
        return Checkpoint(self.profile.trained_by(self.recipe.replace(stop=0.0)))

    @cached_property
    def numbers(self) -> dict[str, float]:
        """What is measured of a partner at its stop, by name."""
        v, delta, base = self.direction(), self.displacements("heldout"), self.final("base", "heldout")
        kl, kl_with_v = self.strength().mean(axis=1)
        shifts = spectra.matched_shifts(v, base.mean(0), 100, self.profile.seed)
        entropy, own = spectra.spectrum(base + delta).entropy, spectra.spectrum(delta)
        centred = [spectra.spectrum(states, centred=True).entropy for states in (base + delta, base)]
        k = held_by(self.token_vectors())
        return {
            "strength": kl,
            self.task.preferred: self.outcome("dpo", 0, "preferred").mean(),
            "KL removed": 1 - kl_with_v / kl,
            "recovered": self.share("base", self.outcome("base", 1, "preferred")),
            "restored": self.share("dpo", self.outcome("dpo", 1, "preferred")),
            "cosine": spectra.cosines(delta, v).mean().item(),
            "explained": 1 - ((delta - v).square().sum() / delta.square().sum()).item(),
            "σ2/σ1": own.ratio,
            "σ2/σ1, centred": spectra.spectrum(delta, centred=True).ratio,
            "cosine to the first step": spectra.cosines(v[None], self.first.direction()).item(),
            "rises": (delta @ self.token_vector().vector > 0).double().mean().item(),
            "entropy": entropy - spectra.shifted_entropies(base, shifts).mean().item(),
            "entropy, centred": centred[0] - centred[1],
            "inside V": inside(delta, spectra.spectrum(self.token_vectors()).directions[:k]),
            "inside the base's components": inside(delta, spectra.spectrum(base, centred=True).directions[:k]),
        } | self._of_facts()

    def _of_facts(self) -> dict[str, float]:
        """What becomes of facts: the share that is stated right, and by how many nats the true value leads."""
        if not self.task.has_facts:
            return {}
        stated = [np.nanmean(self.outcome(role, 0, "fact")) for role in ("dpo", "base")]
        return {"lead": (self.lead("dpo") - self.lead("base")).mean(), "facts stated": stated[0] - stated[1]}

    @cached_property
    def controls(self) -> dict[str, float]:
        """What is measured of the partner that is studied alone: what random directions do at equal KL and random
        displacements give, the dose at which it meets the base, what greedy answers say, and the last block."""
        late = self.displacements("heldout", self.lm.sites[-2])
        of_base = self.states("heldout")["base", self.lm.sites[-2], "prompt_last"]
        lasts = {"": late, ", base": of_base, ", random": self._at_random(late)}
        found = self._by_chance() | {"λ*": self.meeting_dose()}
        found |= {f"greedy, {name}": self.greedy(*arm)["preferred"].mean() for name, arm in GREEDY.items()}
        return found | {
            f"σ1 share, last block{what}": spectra.spectrum(h).mass(1)[0].item() for what, h in lasts.items()
        }

    def _by_chance(self) -> dict[str, float]:
        """What random directions do at the KL of v*, and what displacements of DPO's lengths give at `final`."""
        random = self.at_equal_kl(spectra.random_displacements(torch.ones(RANDOM), len(self.direction()), 1).float())
        delta, V = self._at_random(self.displacements("heldout")), self.token_vectors()
        found = {"σ2/σ1, random": spectra.spectrum(delta).ratio}
        found["inside V, random"] = inside(delta, spectra.spectrum(V).directions[: held_by(V)])
        for name, role, sign in (("recovered", "base", 1), ("restored", "dpo", -1)):
            shares = [self.share(role, x) for x in self.by_arm(role, sign * random)]
            found |= {f"{name}, random": float(np.mean(shares)), f"{name}, largest random": max(shares)}
        return found

    def _at_random(self, delta: Tensor) -> Tensor:
        """Displacements in random directions, each as long as one of `delta`, (N, d)."""
        return spectra.random_displacements(delta.norm(dim=1), delta.shape[1], self.profile.seed)

    def meeting_dose(self) -> float:
        """lambda*: the dose at which DPO - lambda v* shows as much of the preferred behaviour as the base; nan where no
        dose of DOSES reaches it."""
        arms = self.by_arm("dpo", -DOSES[:, None] * self.direction())
        left = [1.0, *(1 - self.share("dpo", x) for x in arms)]
        doses = [0.0, *DOSES.tolist()]
        for (x, above), (y, below) in zip(zip(doses, left), zip(doses[1:], left[1:])):
            if above > 0 >= below:
                return x + (y - x) * above / (above - below)
        return float("nan")


def run(profile: Profile, recipe: Recipe, stops: Sequence[float] = STOPS) -> list[Checkpoint]:
    """The partners at some stops of a recipe's run, by default at all."""
    first, *found = (Checkpoint(profile.trained_by(recipe.replace(stop=stop))) for stop in (0.0, *stops))
    for one in found:
        one.first = first  # one for all: what decides a partner takes long to digest
    return found


def held_by(V: Tensor) -> int:
    """How many leading directions hold HELD of the squared norm of the preference vectors, (M, d)."""
    return int((spectra.spectrum(V).shares.cumsum(0) < HELD).sum()) + 1


def inside(delta: Tensor, directions: Tensor) -> float:
    """The share of the squared norm of displacements, (N, d), along orthonormal directions, (k, d)."""
    delta = delta.double()
    return ((delta @ directions.T).square().sum() / delta.square().sum()).item()


def curve(run: Sequence[Checkpoint]) -> pd.DataFrame:
    """The numbers of a run, a row a stop."""
    return pd.DataFrame([one.numbers for one in run], index=[one.recipe.stop for one in run]).rename_axis("stop")


def at(found: pd.DataFrame, strength: float) -> pd.Series:
    """The numbers of a run's `curve` at a strength, interpolated linearly over its logarithm; nan where the run does
    not reach it. At equal strength partners are compared by what they do, not by how far they were trained."""
    by = found.sort_values("strength")
    x, reached = np.log(by["strength"]), by["strength"].min() <= strength <= by["strength"].max()
    found = {name: np.interp(np.log(strength), x, by[name]) if reached else np.nan for name in by}
    return pd.Series(found | ({"strength": strength} if reached else {}))


def matched(one: pd.DataFrame, other: pd.DataFrame, most: float) -> tuple[pd.Series, pd.Series]:
    """The numbers of two runs, each its `curve`, at the largest strength that both reach, up to `most`; nan where one
    of them is stronger all along than the other ever is."""
    largest = min(most, one["strength"].max(), other["strength"].max())
    strength = largest if largest >= max(one["strength"].min(), other["strength"].min()) else np.nan
    return at(one, strength), at(other, strength)


def label_parts(v_plus: Tensor, v_minus: Tensor) -> tuple[Tensor, Tensor]:
    """What labels decide of a vector and what they have no part in: v_pref = (v+ - v-) / 2 and v_blind = (v+ + v-) / 2,
    from true and from reversed labels, (d,) each."""
    return (v_plus - v_minus) / 2, (v_plus + v_minus) / 2
