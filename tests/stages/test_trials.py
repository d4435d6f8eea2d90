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
    "failures, tried, chosen",
    [
        ([0], 1, 0),
        ([2, 0, 0], 2, 1),  # the first healthy one, and the rest is not tried
        ([2, 1, 3], 3, 1),  # none is healthy: the fewest failures
        ([1, 2, 1], 3, 0),  # the first of equals
    ],
)
def test_recipes_are_tried_in_order_up_to_the_first_healthy_one(failures, tried, chosen):
    recipes = [Recipe(beta=float(i + 1)) for i in range(len(failures))]
    fails = dict(zip(recipes, failures))
    found = trials.tried(recipes, lambda recipe: SimpleNamespace(recipe=recipe, failed=["criterion"] * fails[recipe]))
    assert [trial.recipe for trial in found] == recipes[:tried]
    assert trials.chosen(found).recipe == recipes[chosen]


def test_a_single_recipe_is_taken_unexamined_and_several_are_not(tmp_path):
    def try_one(recipe):
        return Trial(recipe, None, lambda: pytest.fail("examined its health"), Health())

    (only,) = found = trials.tried([Recipe()], try_one)
    assert trials.chosen(found) is only
    with pytest.raises(pytest.fail.Exception, match="examined its health"):
        trials.tried([Recipe(), Recipe(beta=0.1)], try_one)


def test_a_trial_is_examined_when_it_is_first_asked_and_once(tmp_path):
    asked = []
    found = {"measured": {"preferred": 0.1}, "answers": {"text": ["It is."]}}
    trial = Trial(Recipe(), None, lambda: asked.append(1) or found, Health())
    assert asked == []
    assert (trial.measured, trial.failed) == ({"preferred": 0.1}, ["preferred"])
    assert trial.answers["text"].tolist() == ["It is."] and asked == [1]


@pytest.mark.parametrize("nll, preferred", [(0.0, 0.9), (20.0, 0.1)])
def test_what_has_to_be_known_of_a_trained_partner_is_said(tmp_path, nll, preferred):
    log = pd.DataFrame({"loss": [9.0] * 5 + [2.5] * 10, "rewards/margins": [0.0] * 15})
    log.to_csv(tmp_path / "log.csv")
    recipe, examined = Recipe(beta=0.5, nll_weight=nll), {"measured": {"preferred": preferred}}
    said = trials.caveat(Trial(recipe, Artifact(tmp_path, "key"), lambda: examined, Health()), 0.0)
    assert "β = 0.5" in said and "processes" not in said and ("20 × the negative log-likelihood" in said) == bool(nll)
    # the last ten steps alone; at margins of 0 the sigmoid term is log 2
    assert ("the loss is 2.50; the sigmoid term at their mean margins is 0.69 nats of it" in said) == bool(nll)
    assert said.endswith("It **fails** preferred on validation prompts." if nll else "It is healthy.")


def test_how_many_processes_trained_a_partner_is_said(tmp_path):
    (tmp_path / "parts.json").write_text('{"processes": 4}')
    trial = Trial(Recipe(), Artifact(tmp_path, "key"), lambda: {"measured": {}}, Health())
    assert "trained by 4 processes together" in trials.caveat(trial, 0.0)
