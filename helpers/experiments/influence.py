"""Which pairs make v*: how far each lies along it, what is left of the partner without some, and what their states
foretell of likelihoods.

A pair lies along v* by as much as the base's mean state at `final` over its chosen answer lies farther along than that
over its rejected answer.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from helpers import estimates, gradients
from helpers.estimates import Estimate
from helpers.experiments import methods
from helpers.lm.training import TrainingPair
from helpers.profiles import Profile
from helpers.stages.answers_read import answer_logps, answer_states
from helpers.study import Study

SHARE = 0.1  # of the pairs, that are left out or flipped
DRAWS = 3  # of a random tenth
Change = Literal["left out", "flipped"]
Which = Literal["top", "random"]


# --- How far a pair lies along a vector ---


def differences(s: Study) -> Tensor:
    """The base's mean state at `final` over the chosen answer less that over the rejected one, of each held-in pair:
    (N, d)."""
    chosen, rejected = methods.answer_states(s)
    return chosen - rejected


def along(delta: Tensor, v: Tensor) -> np.ndarray:
    """How far each row of (N, d) lies along v, (d,), in the unit of states: (N,)."""
    return (delta.double() @ (v.double() / v.double().norm())).numpy()


def auroc(scores: np.ndarray, positive: np.ndarray, groups: Sequence) -> Estimate:
    """The probability that a positive case scores above another, both drawn at random, ties half: 0.5 where scores tell
    nothing. With its jackknife interval over what the cases share (`estimates.jackknife_interval`), which has no width
    where the two kinds are wholly apart.

    scores, positive: (N,). groups: (K, N).
    """

    def found(rows: np.ndarray) -> float:
        """Mann and Whitney's U by ranks, as a share of all couples of a positive case and another."""
        ranks, kind = stats.rankdata(scores[rows]), positive[rows]
        n = kind.sum()
        return (ranks[kind].sum() - n * (n + 1) / 2) / (n * (len(rows) - n))

    return estimates.jackknife_interval(found, groups).clipped(0, 1)


# --- Partners of changed pairs ---


class Changed(Profile):
    """A profile whose partner is trained after a change to a tenth of the held-in pairs: those that lie farthest along
    v* of the partner of all ("top"), or a random tenth, of which there are several draws."""

    change: Change
    which: Which
    draw: int = 0


class Retrained(Study):
    """The partner of a changed profile. It is measured on the same prompts as the partner of all pairs."""

    @cached_property
    def training_pairs(self) -> list[TrainingPair]:
        """The held-in pairs after the change."""
        return changed(self.whole.training_pairs, self.rows, self.profile.change)

    @cached_property
    def whole(self) -> Study:
        """The partner of all pairs, by the same recipe."""
        return Study(self.profile)

    @cached_property
    def rows(self) -> np.ndarray:
        """Which pairs are changed, in the order of pairs."""
        n = len(self.pairs["heldin"])
        if self.profile.which == "random":
            return random_rows(n, self.profile.seed + self.profile.draw)
        return top_rows(along(differences(self.whole), self.whole.direction()))

    def measure_alone(self) -> None:
        """Compute all that it is compared with the partner of all pairs by."""
        self.displacements("heldout"), self.strength(), self.answers("dpo", "heldout")


def retrained(s: Study, change: Change, which: Which, draw: int = 0) -> Retrained:
    """The partner of a study's chosen recipe and training seed after a change to its pairs. Raises ValueError for a
    ready partner."""
    if not s.trains:
        raise ValueError("This partner is a ready one, so none can be trained on other pairs: leave DPO_MODEL= out.")
    return Retrained(Changed(**dict(s.profile.trained_by(s.recipe)), change=change, which=which, draw=draw))


def top_rows(scores: np.ndarray) -> np.ndarray:
    """The rows of the SHARE of largest scores, in order."""
    return np.sort(np.argsort(-scores, kind="stable")[: _tenth(len(scores))])


def random_rows(n: int, seed: int) -> np.ndarray:
    """A random SHARE of n rows, in order."""
    return np.sort(np.random.default_rng(seed).choice(n, _tenth(n), replace=False))


def _tenth(n: int) -> int:
    return max(1, round(SHARE * n))


def changed(pairs: Sequence[TrainingPair], rows: np.ndarray, change: Change) -> list[TrainingPair]:
    """Pairs without those of some rows ("left out"), or with these swapped ("flipped")."""
    taken = set(rows.tolist())
    if change == "left out":
        return [pair for i, pair in enumerate(pairs) if i not in taken]
    return [pair.swapped if i in taken else pair for i, pair in enumerate(pairs)]


def beyond_draws(one: np.ndarray, draws: np.ndarray, groups: Sequence) -> Estimate:
    """The mean of `one`, (N,), less that of several draws, (k, N), of the same prompts. Its interval takes `one` for a
    further draw: to what the prompts leave open it adds, in quadrature, Student's t interval of how far one more would
    lie from the mean of k."""
    value, low, high, *_ = estimates.interval(estimates.difference, one, draws.mean(axis=0), groups=groups)
    k = len(draws)
    further = stats.t.ppf(0.975, k - 1) * draws.mean(axis=1).std(ddof=1) * np.sqrt(1 + 1 / k)
    return Estimate(
        value, float(value - np.hypot(value - low, further)), float(value + np.hypot(high - value, further))
    )


# --- What the states of a pair foretell ---


def ches(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The centred hidden embedding similarity of pairs, (N,): <a, b> - |a|^2, where a and b are the sums over a chosen
    and a rejected answer's tokens of the states at `final` that predict them, (N, d) each (Razin et al. 2024)."""
    chosen, rejected = chosen.double(), rejected.double()
    return (chosen * rejected).sum(1) - chosen.square().sum(1)


def by_pair(s: Study) -> pd.DataFrame:
    """A row a held-in pair: `along` v*; `CHES`, and `CHES, means` of means in place of sums; `tokens` of the chosen
    answer, and how many of them the rejected one begins with too, `shared`; `log π chosen` and `log π rejected` by the
    base, nats, and the `change` of each by the partner."""
    answers, role = dict(zip(("chosen", "rejected"), s.encoded("heldin"))), s.lm.role("base")
    sums = [answer_states(role, each)["sum"] for each in answers.values()]
    lengths = [torch.tensor([len(tokens.response) for tokens in each]) for each in answers.values()]
    means = [total / length[:, None] for total, length in zip(sums, lengths)]
    found = {"along": along(differences(s), s.direction()), "CHES": ches(*sums), "CHES, means": ches(*means)}
    found["tokens"] = lengths[0]
    found["shared"] = [gradients.first_difference(a.response, b.response) for a, b in zip(*answers.values())]
    for name, each, base in zip(answers, answers.values(), zip(*(pair.base_logps for pair in s.training_pairs))):
        found[f"log π {name}"] = np.array(base)
        found[f"change, {name}"] = np.array(answer_logps(s.lm.role("dpo"), each)) - base
    return pd.DataFrame(found)


def rank_correlation(x: np.ndarray, y: np.ndarray, groups: Sequence) -> Estimate:
    """Spearman's rank correlation of two samples, (N,) each, with its jackknife interval over what their cases share,
    (K, N); nan where one of them is constant."""
    x, y = np.asarray(x), np.asarray(y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(np.nan, np.nan, np.nan)
    return estimates.jackknife_interval(lambda rows: stats.spearmanr(x[rows], y[rows]).statistic, groups).clipped(-1, 1)
