"""A partner's health: what is measured on validation prompts, and the criteria that it can fail."""

import pandas as pd
import pytest

from helpers.stages.examined import failed_criteria, is_fluent
from helpers.stages.health import Health

LIMITS = Health()
HEALTHY = {"preferred": 0.0, "fact_loss": 0.05, "well_formed": 0.97, "perplexity_ratio": 2.0}
WORSE = {"fact_loss": 0.06, "well_formed": 0.96, "perplexity_ratio": 2.01}


@pytest.mark.parametrize("name, value", WORSE.items())
def test_each_criterion_can_fail(name, value):
    assert failed_criteria(HEALTHY, LIMITS) == []  # a value at its limit is healthy
    assert failed_criteria({**HEALTHY, name: value}, LIMITS) == [name]
    assert failed_criteria({name: float("nan")}, LIMITS) == [name]


@pytest.mark.parametrize("column, base, good, bad", [("well_formed", 0.9, 0.88, 0.86), ("token_loss", 1.0, 1.69, 1.70)])
def test_text_is_fluent_where_it_loses_no_more_than_the_criteria_allow(column, base, good, bad):
    """3 % of well-formed text; or twice the perplexity, so log 2 = 0.693 nats a token."""
    own = pd.DataFrame({column: [base] * 2})
    assert is_fluent(pd.DataFrame({column: [good] * 2}), own, LIMITS)
    assert not is_fluent(pd.DataFrame({column: [bad] * 2}), own, LIMITS)


def test_health_is_measured_on_validation_prompts(trained):
    measured, dpo = trained.chosen.measured, trained.answers("dpo", "validation")
    assert measured["preferred"] == pytest.approx(dpo["preferred"].mean())
    assert measured["well_formed"] == pytest.approx(dpo["well_formed"].mean())
    lost = trained.answers("base", "validation")["fact"].mean() - dpo["fact"].mean()
    assert measured["fact_loss"] == pytest.approx(lost)
    assert trained.chosen.answers["text"].tolist() == dpo["text"].tolist()
    assert trained.chosen.failed == failed_criteria(measured, LIMITS)
