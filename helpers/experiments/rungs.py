"""The rungs of the ladder: changes to the base, from one constant vector to the partner's adapter less than whole.

What is found by KL is found on the partner's answers to held-in prompts, its penalties, doses and stops on those to
validation prompts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from helpers import spectra
from helpers.lm import adapters, architecture
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.stages import interventions
from helpers.stages.block_vectors import nearest_vectors
from helpers.stages.divergences import divergences
from helpers.stages.roles import Role
from helpers.stages.shifts import LOW_RANKS, PROBE, PROMPT, STATE, TOKEN, of_kind, one_hot, shifts
from helpers.study import Study

AT_FINAL = {"heldin": 256, "validation": 128}  # prompts, on whose answers by the partner shifts at `final` are found,
THROUGH = {"heldin": 128, "validation": 64}  # and vectors in the blocks, by gradients through the model,
THROUGH_A_LARGE_ONE = {"heldin": 64, "validation": 32}  # which take long on a larger one than the organism
DOSES = tuple(np.round(np.arange(-1, 4.05, 0.1), 1).tolist())  # of v* at `final`, tried on validation prompts,
IN_BLOCKS = (-0.5, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # and in the blocks
SHARES = (0.5, 0.75)  # of what the adapter adds
CUT = (1, 2)  # ranks of the adapter


class Rung(NamedTuple):
    """A model between base and partner. kind: what its change may depend on, or where it is made. role: the model, and
    deltas, what is added to it at `final` (`steering.by_prompt`). parameters: the numbers that it is free in."""

    name: str
    kind: str
    role: Role
    deltas: Tensor
    parameters: int


def rungs(s: Study) -> list[Rung]:
    """All rungs that a partner has: without shifts at `final` where logits are more than W h, and without an adapter's
    where the partner is a whole model."""
    base, v = s.lm.role("base"), s.direction()
    nothing, dose = torch.zeros_like(v)[None], best_dose(s)
    found = [
        Rung("v*", "one vector", base, v[None], len(v)),
        Rung(f"{dose:g} v*", "one vector", base, dose * v[None], len(v) + 1),
    ]
    if s.logits_are_products:
        found += _shifts(s, base, nothing)
    found += _in_blocks(s, base, nothing)
    return found + _of_the_adapter(s, nothing)


# --- At `final` ---


def best_dose(s: Study) -> float:
    """The dose of v* at `final` among DOSES that takes the base nearest to the partner on validation prompts."""
    answered, arms = answered_by_partner(s, "validation", AT_FINAL), torch.tensor(DOSES)[:, None] * s.direction()
    left = divergences(s.lm.role("base"), s.lm.role("dpo"), answered, arms).groupby("arm")["kl"].sum()
    return DOSES[int(left.argmin())]


def _shifts(s: Study, base: Role, nothing: Tensor) -> list[Rung]:
    found, d = nearest_shifts(s), nothing.shape[1]
    by_token, probed, prompted = (of_kind(found, kind) for kind in (TOKEN, PROBE, PROMPT))
    tokens = by_token.M.shape[1]
    read = s.final("base", "heldout")
    added = {
        "v_opt": (s.nearest_vector()[None], d),
        "one a token of the answer": (by_token(one_hot(torch.arange(tokens), tokens))[None, None], tokens * d),
        "two, by a probe of the prompt": (probed(sides(s)["heldout"][:, None])[None], 2 * d + d + 1),
        "linear in the prompt's state": (prompted(read)[None], d + d * d),
    }
    kinds = ("one vector", "by position", "by prompt", "by prompt")
    at_final = [Rung(name, kind, base, z.float(), n) for (name, (z, n)), kind in zip(added.items(), kinds)]
    heads = {f"head, rank {k}": (of_kind(found, STATE, k), d + k * (2 * d - k)) for k in LOW_RANKS}
    heads["head, full rank"] = (of_kind(found, STATE), d + d * d)
    return at_final + [
        Rung(name, "by state", interventions.with_shift(base, shift), nothing, n) for name, (shift, n) in heads.items()
    ]


def nearest_shifts(s: Study) -> dict[str, Tensor]:
    """What stages/shifts.py finds for a partner."""
    of_prompts, answered = sides(s), [answered_by_partner(s, split, AT_FINAL) for split in AT_FINAL]
    asked = tuple(of_prompts[split][: AT_FINAL[split]] for split in AT_FINAL)
    return shifts(*map(s.lm.role, ("base", "dpo")), *answered, asked, s.profile.seed)


def sides(s: Study) -> dict[str, Tensor]:
    """Which of two sides each prompt of a split is on, 1 or -1, (N,), as a linear probe reads it off the base's state.

    The sides are those of held-in displacements along the first of their principal components: what they differ in
    most. The partner is needed for held-in prompts alone.
    """
    moved = s.displacements("heldin").double()
    along = (moved - moved.mean(0)) @ spectra.spectrum(moved, centred=True).directions[0]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(s.final("base", "heldin").double().numpy(), (along > 0).numpy())
    splits = ("heldin", "validation", "heldout")
    return {
        split: torch.from_numpy(2.0 * probe.predict(s.final("base", split).double().numpy()) - 1) for split in splits
    }


# --- In the blocks ---


def _in_blocks(s: Study, base: Role, nothing: Tensor) -> list[Rung]:
    site, dose = best_in_a_block(s)
    every, d = s.lm.sites[:-1], nothing.shape[1]
    found = {
        f"{dose:g} v* at {site}": {site: dose * s.direction(site)},
        f"trained at {site}": trained_in_blocks(s, [site]),
        "trained at all block sites": trained_in_blocks(s, every),
    }
    return [
        Rung(name, "in the blocks", interventions.with_vectors(base, vectors), nothing, len(vectors) * d)
        for name, vectors in found.items()
    ]


def best_in_a_block(s: Study) -> tuple[str, float]:
    """The site in the blocks, of those swept where some are, and the dose among IN_BLOCKS, at which v*, added at every
    position, takes the base nearest to the partner on validation prompts."""
    answered, base, dpo = through(s)["validation"], s.lm.role("base"), s.lm.role("dpo")
    nothing, left = torch.zeros_like(s.direction())[None], {}
    for site in [site for site in s.swept_sites if site != FINAL] or s.lm.sites[1:-1]:
        for dose in IN_BLOCKS:
            steered = interventions.with_vectors(base, {site: dose * s.direction(site)})
            left[site, dose] = divergences(steered, dpo, answered, nothing)["kl"].mean()
    return min(left, key=left.get)


def trained_in_blocks(s: Study, sites: Sequence[str]) -> dict[str, Tensor]:
    """Vectors at sites, trained jointly by KL to the partner (stages/block_vectors.py)."""
    return nearest_vectors(s.lm.role("base"), s.lm.role("dpo"), *through(s).values(), sites)


# --- Of the adapter ---


def _of_the_adapter(s: Study, nothing: Tensor) -> list[Rung]:
    dpo = s.lm.role("dpo")
    with dpo.opened() as model:
        if not adapters.is_plain(model):
            return []
        n = {rank: adapters.parameters(model, rank) for rank in (*CUT, None)}
    cut = [Rung(f"adapter, rank {k}", "adapter", interventions.cut(dpo, k), nothing, n[k]) for k in CUT]
    scaled = [Rung(f"{share:g} × adapter", "adapter", interventions.scaled(dpo, share), nothing, 1) for share in SHARES]
    return scaled + cut


# --- On which answers ---


def answered_by_partner(s: Study, split: str, most: dict[str, int]) -> list[Tokens]:
    """The partner's answers to some prompts of a split."""
    return s.answered("dpo", s.prompts(split)[: most[split]])


def through(s: Study) -> dict[str, list[Tokens]]:
    """The partner's answers, by split, that vectors in the blocks are found on."""
    with s.lm.playing("base") as model:
        most = THROUGH if architecture.is_small(model) else THROUGH_A_LARGE_ONE
    return {split: answered_by_partner(s, split, most) for split in most}
