"""Recipes tried in order, the partner that is chosen, and what is said of it."""

from types import SimpleNamespace

import pandas as pd
import pytest

from helpers.lm.recipe import Recipe
from helpers.stages import trials
from helpers.stages.artifacts import Artifact
from helpers.stages.health import Health
from helpers.stages.trials import Trial


@pytest.mark.parametrize(
    "failures, moved, chosen",
    [
        ([0, 0, 0], [0.4, 0.8, 0.6], 1),  # of the healthy ones the one that moves the behaviour most
        ([0, 1, 0], [0.4, 0.8, 0.6], 2),
        ([2, 1, 1], [0.9, 0.2, 0.3], 2),  # none is healthy: of those that fail the fewest criteria
        ([0, 0], [0.5, 0.5], 0),  # the first of equals
    ],
)
def test_the_recipe_is_chosen_by_one_rule(failures, moved, chosen):
    found = [SimpleNamespace(failed=["x"] * n, measured={"preferred": x}) for n, x in zip(failures, moved)]
    assert trials.chosen(found) is found[chosen]


def test_a_single_recipe_is_taken_unexamined():
    only = Trial(Recipe(), None, lambda: pytest.fail("examined its health"), Health())
    assert trials.chosen([only]) is only


def test_a_stopped_partner_has_the_beginning_of_its_run_s_log(tmp_path):
    pd.DataFrame({"loss": range(8)}).to_csv(tmp_path / "log.csv", index=False)
    for stop, steps in ((0.0, 1), (0.25, 2), (0.5, 4), (1.0, 8)):
        recipe = Recipe(stop=stop)
        trial = Trial(recipe, Artifact(tmp_path / recipe.folder, "key"), lambda: None, Health())
        assert trial.log["loss"].tolist() == list(range(steps))


def test_a_trial_is_examined_when_it_is_first_asked_and_once(tmp_path):
    asked = []
    found = {"well_formed": 0.1}, pd.DataFrame({"text": ["It is."]})
    trial = Trial(Recipe(), None, lambda: asked.append(1) or found, Health())
    assert asked == []
    assert (trial.measured, trial.failed) == ({"well_formed": 0.1}, ["well_formed"])
    assert trial.answers["text"].tolist() == ["It is."] and asked == [1]


@pytest.mark.parametrize("nll, well_formed", [(0.0, 0.99), (20.0, 0.1)])
def test_what_has_to_be_known_of_a_trained_partner_is_said(tmp_path, nll, well_formed):
    log = pd.DataFrame({"loss": [9.0] * 5 + [2.5] * 10, "rewards/margins": [0.0] * 15})
    log.to_csv(tmp_path / "log.csv")
    recipe, examined = Recipe(beta=0.5, nll_weight=nll), ({"well_formed": well_formed}, None)
    said = trials.caveat(Trial(recipe, Artifact(tmp_path, "key"), lambda: examined, Health()), 0.0)
    assert "β = 0.5" in said and "processes" not in said and ("20 × the negative log-likelihood" in said) == bool(nll)
    # the last ten steps alone; at margins of 0 the sigmoid term is log 2
    assert ("the loss is 2.50; the sigmoid term at their mean margins is 0.69 nats of it" in said) == bool(nll)
    assert said.endswith("It **fails** well_formed on validation prompts." if nll else "It is healthy.")


def test_where_perplexity_alone_tells_of_health_it_is_said(tmp_path):
    found = {"preferred": 0.5, "perplexity_ratio": 1.25}
    said = trials.caveat(Trial(None, Artifact(tmp_path, "key"), lambda: (found, None), Health()), 0.0)
    assert said.endswith("It is healthy, as far as perplexity tells (1.25 times the base's; no rule knows facts here).")


def test_how_many_processes_trained_a_partner_is_said(tmp_path):
    (tmp_path / "parts.json").write_text('{"processes": 4}')
    trial = Trial(Recipe(), Artifact(tmp_path, "key"), lambda: ({}, None), Health())
    assert "trained by 4 processes together" in trials.caveat(trial, 0.0)
