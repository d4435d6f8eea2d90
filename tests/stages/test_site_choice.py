"""The best site is better than `final` beyond chance and leaves text as it was."""

import numpy as np
import pandas as pd
import pytest

from helpers.stages import site_choice
from helpers.stages.health import Health

KEYS = [(site, position) for site in ("resid[1]", "resid[2]", "final") for position in ("prompt_last", "response_mean")]
BASE = pd.DataFrame({"ids": [[]] * 6, "well_formed": [1.0] * 5 + [0.0]})


@pytest.mark.parametrize(
    "preferred, well_formed, chosen",
    [  # of six answers at each of KEYS
        ([6, 1, 2, 5, 0, 1], [6] * 6, ("resid[1]", "prompt_last")),
        ([6, 1, 2, 5, 0, 1], [2, 6, 6, 6, 6, 6], ("resid[2]", "response_mean")),
        ([6] * 4 + [0, 0], [2] * 4 + [6, 6], ("final", "prompt_last")),  # no other leaves the text whole
        ([4, 1, 2, 1, 3, 4], [6] * 6, ("final", "prompt_last")),  # no other is ahead beyond chance
    ],
)
def test_it_is_ahead_of_final_beyond_chance_and_fluent(preferred, well_formed, chosen):
    tables = {
        key: pd.DataFrame({"preferred": np.arange(6.0) < p, "well_formed": np.arange(6.0) < w, "ids": [[], *[[7]] * 5]})
        for key, p, w in zip(KEYS, preferred, well_formed)
    }
    tables = {key: table.astype({"preferred": float, "well_formed": float}) for key, table in tables.items()}
    found = site_choice.scores(tables, BASE, np.arange(6), Health())
    assert site_choice.best(found) == chosen
    assert found["preferred"].tolist() == pytest.approx([p / 6 for p in preferred])
    assert found["fluent"].tolist() == [w == 6 for w in well_formed] and set(found["changed"]) == {5 / 6}
