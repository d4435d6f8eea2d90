"""Resamples of what prompts share: the draws that intervals are made of."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from scipy import stats
from tqdm import tqdm

RESAMPLES = 2000


def pigeonholes(n: int, groups: Sequence | None, seed: int = 0) -> np.ndarray:
    """How often each of n prompts counts: once in the first row, then in RESAMPLES resamples, (1 + RESAMPLES, n).
    Raises ValueError where nothing can be drawn."""
    rows = np.atleast_2d(np.arange(n) if groups is None else groups)
    levels = max(len(np.unique(row)) for row in rows)
    if levels < 2:
        raise ValueError(f"An interval needs at least two prompts that differ in what they share, got {levels}.")
    factors = [np.unique(row, return_inverse=True)[1] for row in rows]
    return _drawn(tuple(member.tobytes() for member in factors), seed)


@lru_cache(maxsize=32)  # most intervals of a notebook are over the same prompts
def _drawn(factors: tuple[bytes, ...], seed: int) -> np.ndarray:
    rng, weights = np.random.default_rng(seed), 1.0
    for member in (np.frombuffer(factor, dtype=np.intp) for factor in factors):
        levels = member.max() + 1
        weights = weights * rng.multinomial(levels, np.full(levels, 1 / levels), RESAMPLES)[:, member]
    return np.vstack([np.ones(weights.shape[1]), weights])


def jackknife_half_width(
    statistic: Callable[[np.ndarray], Sequence[float]], rows: np.ndarray, member: np.ndarray
) -> float:
    """The half-width of the jackknife's interval, leaving out one level of a factor at a time."""
    levels = member.max() + 1
    # a spectrum of a large model's states takes long; what takes a moment shows no bar
    each = tqdm(range(levels), desc="jackknife, levels left out", leave=False, delay=2)
    without = np.array([np.mean(statistic(rows[member != i])) for i in each])
    spread = np.sqrt((levels - 1) / levels * np.square(without - without.mean()).sum())
    return float(spread * stats.t.ppf(0.975, levels - 1))
