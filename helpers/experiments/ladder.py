"""How much of DPO is a vector? A ladder of changes to the base, from one constant vector to the partner itself.

A rung is the base with something added, or the partner with something taken away: where it stands is the share of
KL(partner || base) that it removes, and of the behaviour that it recovers. Rungs are of several kinds, and not each
holds the one before it: shares do not add up to a whole. What is found by KL is found on the partner's answers to
held-in prompts, its penalties, doses and stops on those to validation prompts, and told on held-out ones.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from helpers import estimates, gradients, spectra
from helpers.estimates import Estimate
from helpers.lm import adapters, architecture, likelihoods, steering
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.stages import changed
from helpers.stages.beliefs import beliefs
from helpers.stages.block_vectors import nearest_vectors
from helpers.stages.divergences import divergences
from helpers.stages.roles import Role
from helpers.stages.shifts import LOW_RANKS, PROBE, PROMPT, STATE, TOKEN, of_kind, one_hot, shifts
from helpers.stages.tilted import nearest_vector, tilted_divergences
from helpers.study import Study

ANSWERED = {"heldin": 256, "validation": 128}  # prompts, on whose answers by the partner shifts at `final` are found,
THROUGH = {"heldin": 128, "validation": 64}  # and vectors in the blocks, by gradients through the model,
THROUGH_A_LARGE_ONE = {"heldin": 64, "validation": 32}  # which take long on a larger one than the organism
DOSES = tuple(np.round(np.arange(-1, 4.05, 0.1), 1).tolist())  # of v* at `final`, tried on validation prompts,
IN_BLOCKS = (-0.5, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # and in the blocks
SHARES = (0.5, 0.75)  # of what the adapter adds
CUT = (1, 2)  # ranks of the adapter
EVERY = {True: 1, False: 4}  # fact that is asked about: of those asked apart from the preference, every fourth
PARTS = {"1": 1, "2": 2, "3, 4": 4, "5 to 8": 8, "9 on": np.inf}  # up to which token of an answer


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
    answered, arms = _answered(s, "validation", ANSWERED), torch.tensor(DOSES)[:, None] * s.direction()
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
        Rung(name, "by state", changed.with_shift(base, shift), nothing, n) for name, (shift, n) in heads.items()
    ]


def nearest_shifts(s: Study) -> dict[str, Tensor]:
    """What stages/shifts.py finds for a partner."""
    of_prompts, answered = sides(s), [_answered(s, split, ANSWERED) for split in ANSWERED]
    asked = tuple(of_prompts[split][: ANSWERED[split]] for split in ANSWERED)
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
        Rung(name, "in the blocks", changed.with_vectors(base, vectors), nothing, len(vectors) * d)
        for name, vectors in found.items()
    ]


def best_in_a_block(s: Study) -> tuple[str, float]:
    """The site in the blocks, of those swept where some are, and the dose among IN_BLOCKS, at which v*, added at every
    position, takes the base nearest to the partner on validation prompts."""
    answered, base, dpo = _through(s)["validation"], s.lm.role("base"), s.lm.role("dpo")
    nothing, left = torch.zeros_like(s.direction())[None], {}
    for site in [site for site in s.swept_sites if site != FINAL] or s.lm.sites[1:-1]:
        for dose in IN_BLOCKS:
            steered = changed.with_vectors(base, {site: dose * s.direction(site)})
            left[site, dose] = divergences(steered, dpo, answered, nothing)["kl"].mean()
    return min(left, key=left.get)


def trained_in_blocks(s: Study, sites: Sequence[str]) -> dict[str, Tensor]:
    """Vectors at sites, trained jointly by KL to the partner (stages/block_vectors.py)."""
    return nearest_vectors(s.lm.role("base"), s.lm.role("dpo"), *_through(s).values(), sites)


# --- Of the adapter ---


def _of_the_adapter(s: Study, nothing: Tensor) -> list[Rung]:
    dpo = s.lm.role("dpo")
    with dpo.opened() as model:
        if not adapters.is_plain(model):
            return []
        n = {rank: adapters.parameters(model, rank) for rank in (*CUT, None)}
    cut = [Rung(f"adapter, rank {k}", "adapter", changed.cut(dpo, k), nothing, n[k]) for k in CUT]
    scaled = [Rung(f"{share:g} × adapter", "adapter", changed.scaled(dpo, share), nothing, 1) for share in SHARES]
    return scaled + cut


# --- Where a rung stands ---


class Measured(NamedTuple):
    """A rung and what is measured of it, a number a held-out prompt, (N,): `kl`, KL(partner || rung) of the partner's
    answer, nats; what the judge says of sampled answers; and `lead`, by how many nats the true value is ahead, a number
    a fact that is asked about. heldin: the mean KL on the partner's answers to those held-in prompts that vectors in
    the blocks are found on."""

    rung: Rung
    columns: dict[str, np.ndarray]
    heldin: float


def measured(s: Study) -> dict[str, Measured]:
    """{name: what is measured} of the base, every rung and the partner. Rungs of one model are measured together."""
    nothing, dpo = torch.zeros_like(s.direction())[None], s.lm.role("dpo")
    with dpo.opened() as model:
        n = adapters.parameters(model) if adapters.is_plain(model) else sum(p.numel() for p in model.parameters())
    every = [Rung("base", "", s.lm.role("base"), nothing, 0), *rungs(s), Rung("partner", "", dpo, nothing, n)]
    found = {}
    for key in dict.fromkeys(rung.role.key for rung in every):
        found |= _together_measured(s, [rung for rung in every if rung.role.key == key])
    return {rung.name: found[rung.name] for rung in every}


def _together_measured(s: Study, some: Sequence[Rung]) -> dict[str, Measured]:
    """What is measured of rungs of one model."""
    role, dpo, answered = some[0].role, s.lm.role("dpo"), s.answered("dpo", s.prompts("heldout"))
    deltas = _together([rung.deltas for rung in some], len(answered))
    tables = [divergences(role, dpo, answered, deltas), s.sweep(role, FINAL, deltas)]
    tables += [_leads(s, some)] if s.task.has_beliefs else []
    alike, heldin = [rung for rung in some if rung.deltas.ndim == 2], {}  # for every prompt
    if alike:
        arms = torch.cat([rung.deltas for rung in alike])
        kl = divergences(role, dpo, _through(s)["heldin"], arms).groupby("arm")["kl"].mean()
        heldin = {rung.name: kl[arm] for arm, rung in enumerate(alike)}
    found = {}
    for arm, rung in enumerate(some):
        its = [by_arm[by_arm["arm"] == arm].sort_values("prompt") for by_arm in tables]
        columns = {name: column.to_numpy() for by_arm in its if len(by_arm) for name, column in by_arm.items()}
        found[rung.name] = Measured(rung, columns, heldin.get(rung.name, np.nan))
    return found


Found = Mapping[str, Measured]  # what `measured` gives


def table(s: Study, found: Found) -> pd.DataFrame:
    """A row a rung, between the base and the partner: `kind`, `parameters`, estimates of the share of `KL` removed and
    of the `behaviour` recovered, the change of the facts' `lead` (nats), and `fluency`: the share of well-formed
    answers or, where no rule tells, the loss under the base (nats a token), all on held-out prompts; and `held-in`, the
    share of KL on the held-in prompts that vectors in the blocks are found on, nan where a rung is of held-out ones."""
    rows = {name: _row(s, one, found["base"], found["partner"]) for name, one in found.items()}
    return pd.DataFrame(rows).T


def _row(s: Study, one: Measured, base: Measured, partner: Measured) -> dict:
    its, start, groups = one.columns, base.columns, s.clusters()
    way = {"base": start["preferred"], "dpo": partner.columns["preferred"]}
    row = {
        "kind": one.rung.kind,
        "parameters": one.rung.parameters,
        "KL": estimates.interval(estimates.removed_share, its["kl"], start["kl"], groups=groups),
        "held-in": 1 - one.heldin / base.heldin,
        "behaviour": estimates.share_of_the_way("base", its["preferred"], way, groups),
    }
    if "lead" in its:
        asked = s.belief_clusters()[:, :: EVERY[s.task.has_facts]]
        row["lead"] = estimates.interval(estimates.difference, its["lead"], start["lead"], groups=asked)
    return row | {"fluency": its["well_formed" if "well_formed" in its else "token_loss"].mean()}


def gain(s: Study, found: Found, rung: str, beside: str) -> Estimate:
    """By how much more of KL(partner || base) one rung removes than another, prompt by prompt."""
    left, other, base = (found[name].columns["kl"] for name in (rung, beside, "base"))
    return estimates.interval(lambda a, b, whole: (b - a) / whole, left, other, base, groups=s.clusters())


def cost(s: Study, found: Found, rung: str) -> Estimate:
    """By how many nats less the true value leads under a rung than under the partner, fact by fact."""
    leads = (found[name].columns["lead"] for name in ("partner", rung))
    return estimates.interval(estimates.difference, *leads, groups=s.belief_clusters()[:, :: EVERY[s.task.has_facts]])


# --- The ceiling ---


def at_most(s: Study) -> Estimate:
    """The share of KL that the constant vector removes which is found on the very answers to held-out prompts that it
    is told of: no constant vector removes more. What v_opt removes there is the least that the best one can."""
    base, dpo, answered = s.lm.role("base"), s.lm.role("dpo"), s.answered("dpo", s.prompts("heldout"))
    tokens = sum(len(one.response) for one in answered)
    v = nearest_vector(base, dpo, answered, tokens, s.profile.seed)["vector"]
    whole, left = np.split(divergences(base, dpo, answered, torch.stack([0 * v, v]))["kl"].to_numpy(), 2)
    return estimates.interval(estimates.removed_share, left, whole, groups=s.clusters())


def cosines_as_heard(s: Study, others: Mapping[str, Tensor]) -> pd.DataFrame:
    """How v_opt lies to other vectors at `final`, a row each: their `cosine` in the metric of the KL, by which the base
    hears a vector (`gradients.embedding_covariance`), the plain one, and the `norm` of v_opt in theirs."""
    with s.lm.playing("base") as model:
        logps = torch.cat(likelihoods.response_distributions(model, _through(s)["validation"]))
    G, v = gradients.embedding_covariance(s.lm.unembedding, logps), s.nearest_vector().double()
    rows = {}
    for name, other in others.items():
        w = other.double()
        heard = (v @ G @ w / ((v @ G @ v) * (w @ G @ w)).sqrt()).item()
        rows[name] = [heard, spectra.cosines(w[None], v).item(), (v.norm() / w.norm()).item()]
    return pd.DataFrame(rows, ["cosine", "plain cosine", "norm"]).T


def _together(deltas: Sequence[Tensor], prompts: int) -> Tensor:
    """Deltas of several rungs as the arms of one."""
    if all(delta.ndim == 2 for delta in deltas):
        return torch.cat(list(deltas))
    wide = [steering.by_prompt(delta, prompts) for delta in deltas]
    tokens = max(delta.shape[2] for delta in wide)
    last = [delta[:, :, -1:].expand(-1, -1, tokens - delta.shape[2], -1) for delta in wide]
    return torch.cat([torch.cat(parts, dim=2) for parts in zip(wide, last)])


def _leads(s: Study, some: Sequence[Rung]) -> pd.DataFrame:
    """What rungs of one model hold true of the facts that are asked about, a row an `arm` and a fact. Where facts are
    asked apart from the held-out prompts, of those rungs alone that add one vector everywhere."""
    own, role = s.pairs["heldout"], some[0].role
    pairs = s.task.facts_asked(own)[:: EVERY[s.task.has_facts]]
    if not s.task.has_facts:
        arms = [arm for arm, rung in enumerate(some) if rung.deltas.ndim == 2]
        found = beliefs(role, s.task, pairs, torch.cat([some[arm].deltas for arm in arms]))
        return found.assign(arm=np.array(arms)[found["arm"]])
    deltas = _together([rung.deltas for rung in some], len(own))
    if deltas.ndim > 2:  # what is added to a prompt is added to each of the values that are asked about it
        values = torch.tensor([len(s.task.stated(pair)) for pair in pairs])
        deltas = deltas[:, [own.index(pair) for pair in pairs]].repeat_interleave(values, dim=1)
    return beliefs(role, s.task, pairs, deltas)


# --- Where in an answer ---


def by_token(s: Study) -> pd.DataFrame:
    """KL(partner || base + what a rung adds at `final`) of each token of the partner's answers to held-out prompts,
    nats: a row an `arm`, a `prompt` and a `token`. Beside the rungs stand "nothing", and "own, k", each prompt's own
    displacement at its last token cut to k of the held-in displacements' directions. Raises NoBias where logits are
    more than W h."""
    base, answered = s.lm.role("base"), s.answered("dpo", s.prompts("heldout"))
    every = {rung.name: rung.deltas for rung in rungs(s) if rung.role.key == base.key}
    every = {"nothing": torch.zeros_like(every["v*"])} | every | _own(s)
    deltas = _together(list(every.values()), len(answered))
    found = tilted_divergences(base, s.lm.role("dpo"), answered, deltas)
    return found.assign(arm=np.array(list(every))[found["arm"]])


def _own(s: Study) -> dict[str, Tensor]:
    U, moved = spectra.directions(s.displacements("heldin")), s.displacements("heldout").double()
    ks = spectra.ranks(U.shape[1])
    return {f"own, {k}": one[None] for k, one in zip(ks, spectra.truncated(moved @ U.T, U, ks))}


def rank_by_token(found: pd.DataFrame) -> pd.DataFrame:
    """The share of KL that each prompt's own displacement removes, cut to a rank (rows) and at the tokens of an answer
    of PARTS (columns). found: `by_token`'s table."""
    part = pd.cut(found["token"] + 1, [0, *PARTS.values()], labels=list(PARTS))
    left = found.groupby(["arm", part], observed=True)["kl"].mean().unstack()
    own = [arm for arm in found["arm"].unique() if arm.startswith("own")]
    return 1 - left.loc[own] / left.loc["nothing"]


def _answered(s: Study, split: str, most: dict[str, int]) -> list[Tokens]:
    """The partner's answers to some prompts of a split."""
    return s.answered("dpo", s.prompts(split)[: most[split]])


def _through(s: Study) -> dict[str, list[Tokens]]:
    """The partner's answers, by split, that vectors in the blocks are found on."""
    with s.lm.playing("base") as model:
        most = THROUGH if architecture.is_small(model) else THROUGH_A_LARGE_ONE
    return {split: _answered(s, split, most) for split in most}
