"""Means, shares and their intervals: how sure we are of what was measured."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from tqdm import tqdm

RESAMPLES = 2000
REACHED = 0.8  # of the way: what a direction count must recover to be called enough


class Estimate(NamedTuple):
    """A number, its 95 % interval and, where several training seeds were measured, its value for each of them."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()

    def clipped(self, low: float, high: float) -> "Estimate":
        """The same with its interval cut to the values that there are."""
        return self._replace(low=max(self.low, low), high=min(self.high, high))

    def __format__(self, spec: str) -> str:
        """The value and its interval, each by `spec`: f"{estimate:.3f}" is "0.123 [0.100, 0.150]"."""
        value, low, high = (format(x, spec or ".2f") for x in self[:3])
        return f"{value} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)


def interval(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, groups: Sequence | None = None, seed: int = 0
) -> Estimate:
    """A statistic of the means of paired samples, with its 95 % percentile bootstrap interval over prompts and, where
    there are several, training seeds (`_over_seeds`).

    samples: (N,) each, or (seeds, N): the statistic is then averaged over training seeds, which share their prompts
    and a sample without seeds.
    statistic: of the samples' means, elementwise. groups: a label for each prompt, (N,); prompts of one label are drawn
    together, since they resemble each other. Values that are not there (nan) are left out of a mean. Raises ValueError
    for fewer than two groups.
    """
    samples = np.broadcast_arrays(*(np.atleast_2d(np.asarray(sample, dtype=float)) for sample in samples))
    n = samples[0].shape[1]
    labels, member = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    if len(labels) < 2:
        raise ValueError(f"An interval needs at least two prompts that differ in wording, got {len(labels)}.")
    belongs = np.eye(len(labels))[member]  # (N, groups)
    sums = [np.where(np.isnan(sample), 0.0, sample) @ belongs for sample in samples]  # (seeds, groups) each
    counts = [~np.isnan(sample) @ belongs for sample in samples]

    def by_seed(*drawn: np.ndarray, axis: int) -> np.ndarray:
        """The statistic for every seed, (seeds, ...), from the sums and counts of the groups drawn."""
        totals = np.stack(drawn).sum(axis=axis).reshape(2, len(samples), len(samples[0]), -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return statistic(*(totals[0] / totals[1]))

    flat = [*np.concatenate(sums), *np.concatenate(counts)]
    found = by_seed(*flat, axis=-1)[:, 0]
    with warnings.catch_warnings():  # where the statistic is not there, nan says so
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            flat, lambda *drawn, axis: by_seed(*drawn, axis=axis).mean(axis=0), paired=True, vectorized=True,
            n_resamples=RESAMPLES, batch=200, method="percentile", rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = drawn.confidence_interval
    return _over_seeds(found, found.mean() - low, high - found.mean())


def _over_seeds(by_seed: np.ndarray, below: float, above: float) -> Estimate:
    """The mean over training seeds. Its interval adds to what the prompts leave open, `below` and `above` the value,
    what the seeds do: the half-width of their t interval, in quadrature."""
    value, n = float(by_seed.mean()), len(by_seed)
    if n == 1:
        return Estimate(value, value - float(below), value + float(above))
    of_seeds = stats.t.ppf(0.975, n - 1) * by_seed.std(ddof=1) / np.sqrt(n)
    low, high = value - np.hypot(below, of_seeds), value + np.hypot(above, of_seeds)
    return Estimate(value, float(low), float(high), tuple(by_seed.tolist()))


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


def jackknife_interval(statistic: Callable[[np.ndarray], Sequence[float]], groups: Sequence) -> Estimate:
    """A smooth statistic of a matrix's rows and its 95 % jackknife interval (Efron and Stein 1981), a group at a time,
    and over training seeds where there are several (`_over_seeds`).

    statistic: of the indices of the rows kept; one value, or one a training seed, which are averaged. groups: a label
    for each row, (N,). Not a bootstrap: resampled rows hold duplicates, which by themselves raise sigma_1.
    """
    member = np.unique(groups, return_inverse=True)[1]
    rows, g = np.arange(len(member)), member.max() + 1
    by_seed = np.atleast_1d(statistic(rows))
    # a spectrum of a large model's states takes long; what takes a moment shows no bar
    left_out = tqdm(range(g), desc="jackknife, wordings left out", leave=False, delay=2)
    without = np.array([np.mean(statistic(rows[member != i])) for i in left_out])
    error = np.sqrt((g - 1) / g * np.square(without - without.mean()).sum()) * stats.t.ppf(0.975, g - 1)
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
        none = share_interval(np.zeros(len(set(groups)))).high
        return found._replace(high=found.value + none / np.subtract(goal, start).mean())
    return found


def independent_difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other, of estimates that share no sampling error, seed by seed: the half-widths of both in quadrature."""
    value = one.value - other.value
    low = value - np.hypot(one.value - one.low, other.high - other.value)
    high = value + np.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value, low, high, tuple(np.subtract(one.by_seed, other.by_seed)))


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


class Dimension(NamedTuple):
    """A behavioural dimension: the smallest number of directions that is enough (nan: none is), as measured and in
    resamples of groups and training seeds."""

    measured: float
    resampled: np.ndarray

    def __str__(self) -> str:
        """The numbers that nine in ten resamples lie among, the likeliest first."""
        counts = pd.Series(self.resampled).value_counts(normalize=True, dropna=False)
        kept = counts[: int((counts.cumsum() < 0.9).sum()) + 1]
        return ", ".join(f"{'none' if np.isnan(k) else f'{k:g}'} ({share:.0%})" for k, share in kept.items())


def behavioural_dimension(
    steered: Mapping[int, np.ndarray], ends: Mapping[str, np.ndarray], groups: Sequence
) -> Dimension:
    """The smallest k whose recovered share reaches REACHED, measured and in RESAMPLES bootstrap draws over groups and
    over seeds.

    steered: {k: what was measured of the base steered along k directions, (seeds, N)}; ends: of "base" and "dpo",
    (seeds, N). Values that are not there (nan) are left out.
    """
    rng, ks = np.random.default_rng(0), sorted(steered)
    member = np.unique(groups, return_inverse=True)[1]
    of_groups = _resampled(rng, member.max() + 1)[:, member].T  # (N, draws)
    of_seeds = _resampled(rng, len(ends["base"])).T / len(ends["base"])  # (seeds, draws)

    def means(sample: np.ndarray) -> np.ndarray:
        return (np.nan_to_num(sample) @ of_groups) / (~np.isnan(sample) @ of_groups)

    with np.errstate(divide="ignore", invalid="ignore"):
        start, goal = means(ends["base"]), means(ends["dpo"])
        shares = np.array([(recovered_share(means(steered[k]), start, goal) * of_seeds).sum(0) for k in ks])
    reached = shares >= REACHED
    found = np.where(reached.any(0), np.array(ks)[reached.argmax(0)], np.nan)
    return Dimension(float(found[0]), found[1:])


def _resampled(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n things is taken: once each in the first row, then by bootstrap, (RESAMPLES + 1, n)."""
    return np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)])
