"""How many directions are enough to recover a behaviour, with what resamples leave open of it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers.estimates import REACHED, recovered_share
from helpers.evidence.resampling import RESAMPLES, pigeonholes


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
    steered: Mapping[int, np.ndarray], ends: Mapping[str, np.ndarray], groups: Sequence, reference: np.ndarray
) -> Dimension:
    """The smallest k whose recovered share reaches REACHED of the reference's, or of the whole way where that goes
    farther, measured and in RESAMPLES bootstrap draws over groups and over seeds; none where the reference recovers
    less than 1 - REACHED itself.

    steered: {k: what was measured of the base steered along k directions, (seeds, N)}; ends: of "base" and "dpo",
    (seeds, N); reference: the same of all that was read where the directions are, (seeds, N). Values that are not there
    (nan) are left out.
    """
    ks, seeds = sorted(steered), len(ends["base"])
    of_prompts = pigeonholes(ends["base"].shape[1], groups).T  # (N, draws)
    of_seeds = pigeonholes(seeds, np.arange(seeds), 1).T / seeds if seeds > 1 else np.ones((1, RESAMPLES + 1))

    def means(sample: np.ndarray) -> np.ndarray:
        return (np.nan_to_num(sample) @ of_prompts) / (~np.isnan(sample) @ of_prompts)

    with np.errstate(divide="ignore", invalid="ignore"):
        start, goal = means(ends["base"]), means(ends["dpo"])
        every = [*(steered[k] for k in ks), reference]
        *shares, whole = ((recovered_share(means(each), start, goal) * of_seeds).sum(0) for each in every)
    reached = (np.array(shares) >= REACHED * np.minimum(whole, 1)) & (whole >= 1 - REACHED)
    found = np.where(reached.any(0), np.array(ks)[reached.argmax(0)], np.nan)
    return Dimension(float(found[0]), found[1:])
