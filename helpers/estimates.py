"""Means, shares and their intervals: how sure we are of what was measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from helpers.evidence.resampling import jackknife_half_width, pigeonholes

REACHED = 0.8  # of the way: what a direction count must recover to be called enough


class Estimate(NamedTuple):
    """A number, its 95 % interval and, where several training seeds were measured, its value for each of them.

    df: degrees of freedom of the error that the interval's width tells, infinite where it is as good as known.
    """

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()
    df: float = math.inf

    def clipped(self, low: float, high: float) -> "Estimate":
        """The same with its interval cut to the values that there are."""
        return self._replace(low=max(self.low, low), high=min(self.high, high))

    def p(self, no_effect: float) -> float:
        """The two-sided p-value of a value that would mean no effect, by Student's t of the interval's own width."""
        error = (self.high - self.low) / (2 * stats.t.ppf(0.975, self.df))
        if error == 0:
            return float(self.value == no_effect)
        return float(2 * stats.t.sf(abs(self.value - no_effect) / error, self.df))

    def __format__(self, spec: str) -> str:
        """The value and its interval, each by `spec`: f"{estimate:.3f}" is "0.123 [0.100, 0.150]"."""
        value, low, high = (format(x, spec or ".2f") for x in self[:3])
        return f"{value} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)


def interval(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, groups: Sequence | None = None, seed: int = 0
) -> Estimate:
    """A statistic of the means of paired samples, with its 95 % percentile interval by the pigeonhole bootstrap (Owen
    2007) over what prompts share, and over training seeds where there are several (`_over_seeds`).

    samples: (N,) each, or (seeds, N): the statistic is then averaged over training seeds, which share their prompts
    and a sample without seeds.
    statistic: of the samples' means, elementwise. groups: what each prompt shares with others, (N,) labels or (K, N)
    of K crossed factors, such as places and phrasings: in each resample the levels of every factor are drawn by
    themselves, and a prompt counts as often as all of its levels were drawn together. Values that are not there (nan)
    are left out of a mean. Raises ValueError where no factor has two levels.
    """
    samples = np.broadcast_arrays(*(np.atleast_2d(np.asarray(sample, dtype=float)) for sample in samples))
    weights = pigeonholes(samples[0].shape[1], groups, seed)  # (1 + RESAMPLES, N), the first of ones

    def means(sample: np.ndarray) -> np.ndarray:
        """(1 + RESAMPLES, seeds)."""
        return weights @ np.where(np.isnan(sample), 0, sample).T / (weights @ ~np.isnan(sample).T)

    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = statistic(*map(means, samples))
    found, resampled = drawn[0], drawn[1:].mean(axis=1)
    low, high = np.nanpercentile(resampled, [2.5, 97.5]) if np.isfinite(resampled).any() else (np.nan, np.nan)
    return _over_seeds(found, found.mean() - low, high - found.mean())


def _over_seeds(by_seed: np.ndarray, below: float, above: float) -> Estimate:
    """The mean over training seeds. Its interval adds to what the prompts leave open, `below` and `above` the value,
    what the seeds do: the half-width of their t interval, in quadrature, since three are too few to be drawn from. Its
    degrees of freedom are those of both (Satterthwaite)."""
    value, n = float(by_seed.mean()), len(by_seed)
    if n == 1:
        return Estimate(value, value - float(below), value + float(above))
    error = by_seed.std(ddof=1) / np.sqrt(n)
    of_seeds, of_prompts = stats.t.ppf(0.975, n - 1) * error, (below + above) / (2 * stats.norm.ppf(0.975))
    low, high = value - np.hypot(below, of_seeds), value + np.hypot(above, of_seeds)
    df = (n - 1) * (1 + (of_prompts / error) ** 2) ** 2 if error else math.inf
    return Estimate(value, float(low), float(high), tuple(by_seed.tolist()), float(df))


def share_interval(sample: np.ndarray) -> Estimate:
    """The share of ones in a sample of zeros and ones, (N,) or (seeds, N), with Wilson's 95 % interval for N prompts
    and, where there are several, training seeds (`_over_seeds`).

    Unlike a bootstrap it has a width where every value is the same. It takes prompts for independent. Values that are
    not there (nan) are left out.
    """
    sample = np.atleast_2d(np.asarray(sample, dtype=float))
    by_seed = np.nanmean(sample, axis=1)
    n = int(np.isfinite(sample).sum(axis=1).min())
    found = stats.binomtest(int(by_seed.mean() * n + 1e-9), n).proportion_ci(method="wilson")
    below, above = max(by_seed.mean() - found.low, 0.0), max(found.high - by_seed.mean(), 0.0)
    return _over_seeds(by_seed, below, above).clipped(0, 1)


def rate(sample: np.ndarray, groups: Sequence | None = None) -> Estimate:
    """The share of ones in a sample of zeros and ones by `interval`, or by `share_interval` where all are alike: a
    bootstrap would have no width there."""
    return share_interval(sample) if np.ptp(sample) == 0 else interval(mean, sample, groups=groups)


def across(values: Sequence[float]) -> Estimate:
    """The mean of independent replicates with Student's 95 % t interval: of worlds, in whose spread lies all that is
    nested in them, or of training seeds. Raises ValueError for fewer than two."""
    if len(values) < 2:
        raise ValueError(f"An interval over replicates needs at least two, got {len(values)}.")
    return _over_seeds(np.asarray(values, dtype=float), 0.0, 0.0)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number (Holm 1979): the k-th smallest of n times n - k + 1, never below a smaller
    one's."""
    adjusted, largest = {}, 0.0
    for k, name in enumerate(sorted(ps, key=ps.get)):
        largest = max(largest, min(1.0, (len(ps) - k) * ps[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in ps}


def jackknife_interval(statistic: Callable[[np.ndarray], Sequence[float]], groups: Sequence) -> Estimate:
    """A smooth statistic of a matrix's rows and its 95 % jackknife interval (Efron and Stein 1981), a group at a time,
    and over training seeds where there are several (`_over_seeds`).

    statistic: of the indices of the rows kept; one value, or one a training seed, which are averaged. groups: a label
    for each row, (N,), or (K, N) of K crossed factors, whose squared errors are added: more than there is, since both
    count what they share. Not a bootstrap: resampled rows hold duplicates, which by themselves raise sigma_1. Raises
    ValueError where no factor has two levels.
    """
    factors = [np.unique(row, return_inverse=True)[1] for row in np.atleast_2d(groups)]
    if not any(member.max() for member in factors):
        raise ValueError("A jackknife leaves groups out, and all rows are of one: give rows of two groups at least.")
    rows = np.arange(len(factors[0]))
    by_seed = np.atleast_1d(statistic(rows))
    error = np.hypot.reduce([jackknife_half_width(statistic, rows, member) for member in factors if member.max()])
    return _over_seeds(by_seed, error, error)


def mean(sample: np.ndarray) -> np.ndarray:
    """The identity: the statistic of one sample that is its mean."""
    return sample


def difference(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """after - before, of two means."""
    return after - before


def recovered_share(steered: np.ndarray, start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """(steered - start) / (goal - start), of means: 0 nothing, 1 all of the way; nan where there is no way to go.

    With start = base and goal = DPO it is the recovered share of base + lambda v*; the other way round, the restored
    share of dpo - lambda v*.
    """
    way = np.asarray(goal - start, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(way == 0, np.nan, (steered - start) / way)


def further_on(own: np.ndarray, other: np.ndarray, start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """How much more of the way from start to goal, of means, one steered model goes than another."""
    return recovered_share(own, start, goal) - recovered_share(other, start, goal)


def removed_share(remaining: np.ndarray, total: np.ndarray) -> np.ndarray:
    """1 - remaining / total, of means: the share of KL(dpo || base) that a change to the base removes, or the share of
    squared displacement that a vector explains."""
    return 1 - remaining / total


def share_of_the_way(
    role: str, steered: np.ndarray, ends: Mapping[str, np.ndarray], groups: Sequence, bounded: bool = False
) -> Estimate:
    """The recovered share of base + v (role "base") or the restored share of dpo - v ("dpo"), with its interval.

    steered: what was measured of the steered model; ends: of "base" and of "dpo" without steering. Each (N,), or
    (seeds, N). groups: as for `interval`.
    bounded: where no resample moves, and so the interval has no width, its upper end is Wilson's bound for none in as
    many groups, as a share of the way.
    """
    start, goal = ends[role], ends["dpo" if role == "base" else "base"]
    found = interval(recovered_share, steered, start, goal, groups=groups)
    if bounded and found.low == found.high:
        none = share_interval(np.zeros(min(len(set(row)) for row in np.atleast_2d(groups)))).high
        return found._replace(high=found.value + none / abs(np.subtract(goal, start).mean()))
    return found


def independent_difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other, of estimates that share no sampling error, seed by seed: the half-widths of both in quadrature."""
    value = one.value - other.value
    low = value - np.hypot(one.value - one.low, other.high - other.value)
    high = value + np.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value, low, high, tuple(np.subtract(one.by_seed, other.by_seed)), min(one.df, other.df))


def by_prompt(table: pd.DataFrame, column: str, **where) -> np.ndarray:
    """A column of the rows in which each column named in `where` has the value given, in the order of prompts: (N,).

    Raises ValueError where a prompt has several such rows: an arm, a dose or a draw was not named.
    """
    rows = table
    for name, value in where.items():
        rows = rows[rows[name] == value]
    if rows["prompt"].duplicated().any():
        raise ValueError(f"by_prompt: prompts have several rows where {where}: name one arm of the table.")
    return rows.sort_values("prompt")[column].to_numpy()
