"""How much of DPO is a vector? A ladder of changes to the base, from one constant vector to the partner itself.

A rung is the base with something added, or the partner with something taken away (rungs.py): where it stands is the
share of KL(partner || base) that it removes, and of the behaviour that it recovers, on held-out prompts. Rungs are of
several kinds, and not each holds the one before it: shares do not add up to a whole.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import estimates, gradients, spectra
from helpers.estimates import Estimate
from helpers.experiments.rungs import Rung, rungs, through
from helpers.lm import adapters, likelihoods, steering
from helpers.lm.architecture import FINAL
from helpers.stages.beliefs import beliefs
from helpers.stages.divergences import divergences
from helpers.stages.tilted import MOST_LOGITS, nearest_vector, tilted_divergences
from helpers.study import Study

ASKED = 4  # of facts that are asked apart from the preference, every fourth is
PARTS = {"1": 1, "2": 2, "3, 4": 4, "5 to 8": 8, "9 on": np.inf}  # up to which token of an answer


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
        kl = divergences(role, dpo, through(s)["heldin"], arms).groupby("arm")["kl"].mean()
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
        row["lead"] = estimates.interval(estimates.difference, its["lead"], start["lead"], groups=_facts(s))
    return row | {"fluency": its["well_formed" if "well_formed" in its else "token_loss"].mean()}


def gain(s: Study, found: Found, rung: str, beside: str) -> Estimate:
    """By how much more of KL(partner || base) one rung removes than another, prompt by prompt."""
    left, other, base = (found[name].columns["kl"] for name in (rung, beside, "base"))
    return estimates.interval(lambda a, b, whole: (b - a) / whole, left, other, base, groups=s.clusters())


def cost(s: Study, found: Found, rung: str) -> Estimate:
    """By how many nats less the true value leads under a rung than under the partner, fact by fact."""
    leads = (found[name].columns["lead"] for name in ("partner", rung))
    return estimates.interval(estimates.difference, *leads, groups=_facts(s))


def _asked(s: Study) -> slice:
    """Which facts are asked about, of the task's `facts_asked`."""
    return slice(None, None, 1 if s.task.has_facts else ASKED)


def _facts(s: Study) -> np.ndarray:
    """What the facts that are asked about share (`Study.belief_clusters`)."""
    return s.belief_clusters()[:, _asked(s)]


# --- The ceiling ---


def at_most(s: Study) -> Estimate:
    """The share of KL that the constant vector removes which is found on the very answers to held-out prompts that it
    is told of, or to as many as one search holds: on these no constant vector removes more. What v_opt removes there is
    the least that the best one can."""
    base, dpo, answered = s.lm.role("base"), s.lm.role("dpo"), s.answered("dpo", s.prompts("heldout"))
    tokens = np.cumsum([len(one.response) for one in answered])
    held = tokens[tokens <= MOST_LOGITS // len(s.lm.unembedding)]
    n = len(held)
    v = nearest_vector(base, dpo, answered[:n], int(held[-1]), s.profile.seed)["vector"]
    whole, left = np.split(divergences(base, dpo, answered[:n], torch.stack([0 * v, v]))["kl"].to_numpy(), 2)
    return estimates.interval(estimates.removed_share, left, whole, groups=s.clusters()[..., :n])


def cosines_as_heard(s: Study, others: Mapping[str, Tensor]) -> pd.DataFrame:
    """How v_opt lies to other vectors at `final`, a row each: their `cosine` in the metric of the KL, by which the base
    hears a vector (`gradients.embedding_covariance`), the plain one, and the `norm` of v_opt in theirs."""
    with s.lm.playing("base") as model:
        logps = torch.cat(likelihoods.response_distributions(model, through(s)["validation"]))
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
    pairs = s.task.facts_asked(own)[_asked(s)]
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
