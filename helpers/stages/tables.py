"""Values by arm and prompt as a table."""

import numpy as np
import pandas as pd


def by_arm(**values: np.ndarray) -> pd.DataFrame:
    """A row an arm and a prompt from (arms, prompts) arrays, a column each."""
    arms, prompts = np.indices(next(iter(values.values())).shape)
    return pd.DataFrame({"arm": arms.ravel(), "prompt": prompts.ravel()} | {k: v.ravel() for k, v in values.items()})
