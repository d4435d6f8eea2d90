"""One page about a base and its partner: what moved, how much of it is one vector, and what that vector says.

Beside every number stands what chance would give it. Chance is RANDOM directions with the covariance of the base's own
states, since any direction in which states vary already has a head start over one drawn evenly. What no ready partner
can be compared with, such as training on the chosen answers alone, is not told here: nothing on the page is by itself
DPO's own doing.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import estimates, spectra
from helpers.data import naming
from helpers.data.unrelated import unrelated_texts
from helpers.estimates import REACHED, Estimate
from helpers.experiments.strength import RANDOM
from helpers.lm import activations, decoding, encoding, loading
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.profiles import EMBEDDED
from helpers.stages import sampled
from helpers.stages.states import states
from helpers.stages.tilted import tilted_divergences
from helpers.study import Study

DOSES = (0.0, 0.5, 1.0, 1.5, 2.0)
ASKED, AMONG = 4, 16  # prompts answered at each dose, and how many are looked at for them
FIRST = 5  # tokens of unrelated texts
FEWEST = 8  # answers that an average over one position takes, or all where there are fewer
LENGTHS = (1.0, 0.5, 0.25, 0.125, -0.125, -0.25, -0.5, -1.0)  # of random directions beside v_opt, 1 as strong as v*
HARDLY_ANY = 1 - REACHED  # the share below which a sentence says so; nearly all is REACHED and more


def about(s: Study) -> str:
    """Whose page this is: base, partner and data, files and folders by their last name."""
    base, partner, data = s.profile.model, s.profile.dpo_model, s.profile.data
    before, source = naming.split_prefix(data)
    base = f"the organism of {s.profile.organism.places} places" if base == EMBEDDED else _last_name(base)
    named = [base, _last_name(partner) if partner else "trained here", before + _last_name(source)]
    return "; ".join(f"{what} **{name}**" for what, name in zip(("Base", "partner", "data"), named)) + "."


def _last_name(source: str) -> str:
    return Path(source).name if Path(source).exists() else source


def moved(s: Study) -> pd.DataFrame:
    """How far held-out prompts' states move, a row a site, as shares of the mean norm of the base's states there.

    At `prompt_last` and as `response_mean`; beside each the `spread` of the base's states there, their mean distance
    from their own mean, and what `rounding` to the profile's precision does at the prompt's last token.
    """
    found, dtype = s.states("heldout"), getattr(torch, s.profile.dtype)
    rows = {}
    for site in s.lm.sites:
        distances = {}
        for position in activations.POSITIONS:
            base = found["base", site, position]
            moved, spread = s.displacements("heldout", site, position), base - base.mean(0)
            beside = {position: moved.norm(dim=1), f"spread, {position}": spread.norm(dim=1)}
            if position == "prompt_last":
                beside["rounding"] = activations.rounding(base, dtype)
            size = base.norm(dim=1).mean()
            distances |= {name: distance.mean() / size for name, distance in beside.items()}
        rows[site] = distances
    return pd.DataFrame(rows).T.astype(float)


# --- One vector's share ---


def vectors(s: Study) -> dict[str, Tensor]:
    """v* and, where logits are W h, v_opt, the constant vector that takes the base nearest to its partner, (d,)."""
    return {"v*": s.direction()} | ({"v_opt": s.nearest_vector()} if s.logits_are_products else {})


def by_chance(s: Study) -> Tensor:
    """RANDOM directions with the covariance of the base's held-in states, each as long as it takes for its KL to the
    base to be that of v*: (RANDOM, d)."""
    random = spectra.random_like(s.final("base", "heldin"), RANDOM, s.profile.seed).float()
    return s.at_equal_kl(random)


def kl_by_token(s: Study) -> pd.DataFrame:
    """KL(partner || base + v) of each token of the partner's answers to held-out prompts, nats: a row an `arm`, a
    `prompt` and a `token`. Arms are "nothing", `vectors` and `by_chance`'s, "random 0" and on, which beside v_opt are
    tried at other LENGTHS too, "random 0 × 0.5". Where logits are more than W h it is told of whole answers, as of
    token 0."""
    arms, random = {"nothing": 0 * s.direction()} | vectors(s), by_chance(s)
    for length in LENGTHS if "v_opt" in arms else LENGTHS[:1]:
        arms |= {f"random {i}" + f" × {length:g}" * (length != 1): length * v for i, v in enumerate(random)}
    deltas = torch.stack(list(arms.values()))
    if s.logits_are_products:
        answered = s.answered("dpo", s.prompts("heldout"))
        found = tilted_divergences(s.lm.role("base"), s.lm.role("dpo"), answered, deltas)
    else:
        found = s.divergences("base", deltas).assign(token=0)
    return found.assign(arm=np.array(list(arms))[found["arm"]])


def by_position(s: Study, found: pd.DataFrame) -> pd.DataFrame:
    """The mean of `kl_by_token`'s table at each position of an answer that FEWEST answers reach, its interval over
    prompts: a row an `arm` and a `token`. Of random directions at all their lengths there is the one that leaves least,
    as "random"."""
    groups, rows, left = s.factors("heldout"), [], found.groupby("arm")["kl"].sum()
    random = left[left.index.str.startswith("random ")]
    shown = found if random.empty else found.replace({"arm": {random.idxmin(): "random"}})
    for (arm, token), some in shown[~shown["arm"].str.startswith("random ")].groupby(["arm", "token"]):
        if len(some) >= min(FEWEST, groups.shape[1]):
            over = estimates.interval(estimates.mean, some["kl"], groups=groups[:, some["prompt"]])
            rows.append({"arm": arm, "token": token, "value": over.value, "low": over.low, "high": over.high})
    return pd.DataFrame(rows)


def shares(s: Study, found: pd.DataFrame) -> pd.DataFrame:
    """What share of the partner one vector is, a row a measure: `value`, `low`, `high` over held-out prompts, and what
    the best of the random directions reaches, `chance`: beside v* as strong as it, beside v_opt at its best of LENGTHS.
    found: `kl_by_token`'s table."""
    rows = _of_states(s) | _of_distributions(s, found) | (_of_behaviour(s) if s.task.has_judge else {})
    return pd.DataFrame({name: [*over[:3], chance] for name, (over, chance) in rows.items()}, _COLUMNS).T


_COLUMNS = ["value", "low", "high", "chance"]
Rows = dict[str, tuple[Estimate, float]]


def _of_states(s: Study) -> Rows:
    delta, v, groups = s.displacements("heldout").double(), s.direction().double(), s.factors("heldout")
    squares, left = (x.square().sum(1).numpy() for x in (delta, delta - v))
    random = torch.nn.functional.normalize(spectra.random_like(s.final("base", "heldin"), RANDOM, s.profile.seed))
    along = (delta @ random.T).square().sum(0) / delta.square().sum()  # each at its best length for every prompt
    turned = spectra.cosines(delta, v).numpy()
    return {
        "of squared displacement, v*": (
            estimates.interval(estimates.removed_share, left, squares, groups=groups),
            along.max().item(),
        ),
        "cosine of displacements to v*": (
            estimates.interval(estimates.mean, turned, groups=groups),
            max(spectra.cosines(delta, one).mean().abs().item() for one in random),
        ),
    }


def _of_distributions(s: Study, found: pd.DataFrame) -> Rows:
    left, groups = found.groupby(["arm", "prompt"])["kl"].sum().unstack("arm"), s.factors("heldout")
    removed = {arm: 1 - left[arm].sum() / left["nothing"].sum() for arm in left if arm.startswith("random")}
    chance = {"v*": max(share for arm, share in removed.items() if "×" not in arm), "v_opt": max(removed.values())}
    return {
        f"of KL, {arm}": (estimates.interval(estimates.removed_share, left[arm], left["nothing"], groups=groups), most)
        for arm, most in chance.items()
        if arm in left
    }


def _of_behaviour(s: Study) -> Rows:
    ends, random = {role: s.outcome(role, 0, "preferred") for role in loading.ROLES}, by_chance(s)
    rows = {}
    for name, role, sign in (("recovered by base + v*", "base", 1), ("restored by DPO − v*", "dpo", -1)):
        over = estimates.share_of_the_way(role, s.outcome(role, 1, "preferred"), ends, s.factors("heldout"))
        rows[f"of behaviour, {name}"] = over, max(s.share(role, x) for x in s.by_arm(role, sign * random))
    return rows


def in_words(found: pd.DataFrame) -> str:
    """From the table of `shares`: how much of what training changed is one vector, in a plain sentence, and the numbers
    that it follows from."""
    removed = {name: found.loc[f"of KL, {name}"] for name in ("v*", "v_opt") if f"of KL, {name}" in found.index}
    best = removed.get("v_opt", removed["v*"])
    amount = "part of"
    if best["low"] >= REACHED:
        amount = "nearly all of"
    elif best["high"] <= HARDLY_ANY:
        amount = "hardly any of"
    each = [f"{name} {_removes(*row[['value', 'low', 'high']])}" for name, row in removed.items()]
    length = f"at the best of {len(LENGTHS)} lengths" if "v_opt" in removed else "as strong as v*"
    return (
        f"One fixed vector, added to the base's states, can do **{amount}** what training changed in what this model "
        f"says next. Of the divergence of their next-token probabilities {', '.join(each)}, and the best of {RANDOM} "
        f"random directions, each {length}, {_removes(best['chance'])}."
    )


def _removes(share: float, *interval: float) -> str:
    """A share that is removed, or added where it is negative, and its interval."""
    sign = 1 if share >= 0 else -1
    ends = f" [{', '.join(f'{end:.0%}' for end in sorted(sign * end for end in interval))}]" if interval else ""
    return f"{'removes' if share >= 0 else 'adds'} {sign * share:.0%}{ends}"


# --- What it says ---


def token_changes(s: Study) -> tuple[pd.Series, float]:
    """By how many standard deviations over the vocabulary v* changes each token's logit, by token, and the largest such
    change that the random directions make."""
    W, tokenizer = s.lm.unembedding, s.lm.tokenizer
    random = spectra.random_like(s.final("base", "heldin"), RANDOM, s.profile.seed).float()
    changes = W @ torch.cat([s.direction()[None], random]).T  # (vocabulary, 1 + RANDOM)
    known = min(len(W), len(tokenizer))  # of more rows than tokens the rest has no name
    standard = ((changes - changes.mean(0)) / changes.std(0))[:known]
    names = [tokenizer.decode([i]) for i in range(known)]
    return pd.Series(standard[:, 0].numpy(), names).sort_values(), standard[:, 1:].abs().max().item()


def elsewhere(s: Study) -> pd.DataFrame:
    """How the first tokens of texts that have nothing to do with the preferences move, a row a site: the `cosine` of
    their mean displacement to v* there, its `size` as a share of v*'s, the cosine that one in forty random directions
    exceeds (`chance`), and the size, root mean square, that the mean would have if each text's tokens moved as far, all
    in one random direction (`size by chance`)."""
    texts = _beginnings(s)
    kept = {role: states(s.lm.role(role), texts, ("prompt_last",)).path for role in loading.ROLES}
    read = {role: activations.Stored(activations.stored(path)) for role, path in kept.items()}
    rows = {}
    for site in s.lm.sites:
        base, dpo = (read[role][site, "prompt_last"] for role in loading.ROLES)
        delta, v = (dpo - base).double(), s.direction(site).double()
        shift = delta.mean(0)
        if v.norm() > 0 and shift.norm() > 0:  # the embeddings are moved by no adapter
            random = spectra.random_like(base, 50 * RANDOM, s.profile.seed)
            chance = spectra.cosines(random, v).abs().quantile(0.975).item()
            of_texts = delta.view(-1, FIRST, delta.shape[1]).mean(1)
            sizes = [(length / v.norm()).item() for length in (shift.norm(), of_texts.norm() / len(of_texts))]
            rows[site] = [spectra.cosines(shift[None], v).item(), sizes[0], chance, sizes[1]]
    return pd.DataFrame(rows, ["cosine", "size", "chance", "size by chance"]).T


def _beginnings(s: Study) -> list[Tokens]:
    """Unrelated texts up to each of their first FIRST tokens; of the organism, texts of its own corpus."""
    texts, tokenizer = unrelated_texts(), s.lm.tokenizer
    if s.profile.model == EMBEDDED:
        texts = s.task.corpus_texts(len(texts))
    ids = [encoding.begun(tokenizer, text) for text in texts]
    starts = [
        len(whole) - len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text, whole in zip(texts, ids)
    ]
    return [Tokens(whole[: start + n]) for start, whole in zip(starts, ids) for n in range(1, FIRST + 1)]


def answers(s: Study) -> pd.DataFrame:
    """Answers at each of DOSES, sampled with the same random numbers, to the first ASKED held-out prompts which base
    and partner then answer differently, if so many of the first AMONG are: a row a `prompt` and a `dose`, and a column
    of `base`, `base + λv*`, `DPO − λv*` and `DPO` each."""
    pairs, prompts, v, sizes = s.pairs["heldout"][:AMONG], s.prompts("heldout")[:AMONG], s.direction(), s.profile.sizes
    said = {}
    for name, role, sign in (("base + λv*", "base", 1), ("DPO − λv*", "dpo", -1)):
        deltas = sign * torch.tensor(DOSES)[:, None] * v
        found = sampled.under_arms(
            s.lm.role(role), prompts, sizes.new_tokens, s.profile.seed, 1, FINAL, deltas, "response", sizes.temperature
        )
        said[name] = [decoding.texts(s.lm.tokenizer, found.first(arm)) for arm in range(len(DOSES))]
    said |= {end: [said[name][0]] * len(DOSES) for end, name in (("base", "base + λv*"), ("DPO", "DPO − λv*"))}
    columns = ("base", "base + λv*", "DPO − λv*", "DPO")
    alike_last = sorted(range(len(pairs)), key=lambda i: said["base"][0][i] == said["DPO"][0][i])
    rows = [
        {"prompt": pairs[i].prompt, "dose": dose} | {name: said[name][arm][i] for name in columns}
        for i in alike_last[:ASKED]
        for arm, dose in enumerate(DOSES)
    ]
    return pd.DataFrame(rows)
