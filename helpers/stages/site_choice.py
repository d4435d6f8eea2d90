"""Which site a vector does most at, by validation prompts."""

import numpy as np
import pandas as pd

from helpers import estimates
from helpers.lm.architecture import FINAL
from helpers.stages import examined
from helpers.stages.health import Health

USUAL = (FINAL, "prompt_last")


def scores(
    tables: dict[tuple[str, str], pd.DataFrame], base: pd.DataFrame, factors: np.ndarray, health: Health
) -> pd.DataFrame:
    """base + v* at dose 1 of each site and position, on validation prompts: a row each, indexed by the two.

    tables: the judged answers. `preferred`: the share that shows the preferred behaviour; `ahead`: by how much that
    exceeds v* at `final`, `prompt_last`, the low end of the 95 % interval; `changed`: the share of answers not the
    base's own; `fluent`: whether the text loses no more against the base's own than the health criteria allow.
    """
    usual = tables[USUAL]["preferred"].to_numpy()
    rows = {
        key: {
            "preferred": table["preferred"].mean(),
            "ahead": estimates.interval(estimates.difference, table["preferred"], usual, groups=factors).low,
            "changed": np.mean([ids != own for ids, own in zip(table["ids"], base["ids"])]),
            "fluent": examined.is_fluent(table, base, health),
        }
        for key, table in tables.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def best(found: pd.DataFrame) -> tuple[str, str]:
    """The site and position of `scores` with most of the preferred behaviour: `final`, `prompt_last` unless another
    is ahead of it beyond chance and fluent."""
    better = found[found["fluent"] & (found["ahead"] > 0)]
    return tuple(better["preferred"].idxmax()) if len(better) else USUAL
