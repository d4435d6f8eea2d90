"""A base and its partners: trained by other recipes, with other seeds, on other preferences, or ready ones."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from joblib.externals.loky.backend import reduction
from peft import PeftModel
from studied import PROFILE, RECIPE, logits
from transformers import AutoModelForCausalLM

from helpers import study
from helpers.chapters import subject
from helpers.data import truthfulqa
from helpers.lm import training
from helpers.lm.recipe import Grid
from helpers.stages import artifacts, parallel
from helpers.stages.artifacts import NotCached
from helpers.stages.states import final_states
from helpers.study import Study

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """What is given to worker processes is computed in this one: test_parallel.py is about them."""

    def each(function, items, name):
        computed = pickle.loads(reduction.dumps(function))  # as it reaches a worker
        for item in items:
            computed(item)

    monkeypatch.setattr(parallel, "each", each)


# --- Other recipes ---


def test_a_variant_has_the_same_base_and_pairs_and_another_partner(trained):
    other = trained.variant(labels="reversed", rank=2)
    assert other.profile == PROFILE.trained_by(RECIPE.replace(labels="reversed", rank=2))
    with artifacts.nothing_made():
        assert (other.source, other.pairs) == (trained.source, trained.pairs)
        kept = [final_states(study.lm.role("base"), study.prompts("heldin")) for study in (other, trained)]
        assert kept[0] == kept[1]
        assert other.answers("base", "heldout").equals(trained.answers("base", "heldout"))
        for ask in (lambda s: s.chosen.adapter, lambda s: s.answers("dpo", "heldout"), lambda s: s.states("heldin")):
            with pytest.raises(NotCached):
                ask(other)


@pytest.mark.parametrize("changes", [{}, {"rank": 4}, {"labels": "true", "objective": "dpo"}])
def test_a_variant_without_a_change_is_the_study_itself(trained, changes):
    assert trained.variant(**changes) is trained


@pytest.mark.parametrize("changes", [{"ranks": 2}, {"labels": "swapped"}])
def test_a_variant_that_is_no_recipe_is_refused(trained, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        trained.variant(**changes)


def test_the_recipe_of_a_study_of_one_is_known_without_training_and_so_are_its_variants(monkeypatch):
    monkeypatch.setattr(Study, "_trial", lambda *_: pytest.fail("trained a partner"))
    made = Study(PROFILE)
    assert made.recipe == RECIPE and made.variant(seed=3).recipe == RECIPE.replace(seed=3)
    assert made.about("atlas:belief").variant(seed=3).about(PROFILE.data).profile == made.variant(seed=3).profile


def test_a_study_of_a_grid_takes_the_healthy_one_that_moves_most_for_each_preference_anew(trained, monkeypatch):
    made = Study(PROFILE.replace(grid=Grid(beta=(0.5, 1.0, 2.0))))
    asked = []

    def tried(self, recipe):
        asked.append((self.profile.data, recipe.beta))
        return SimpleNamespace(
            recipe=recipe, failed=["fact_loss"] * (recipe.beta == 2), measured={"preferred": recipe.beta}
        )

    monkeypatch.setattr(Study, "_trial", tried)
    assert made.recipe == RECIPE and made.variant(seed=1).profile.recipes == (RECIPE.replace(seed=1),)
    assert made.about("atlas:belief").recipe == RECIPE and len(asked) == 6


def test_a_partner_at_a_stop_is_of_the_same_run(trained):
    early, run = trained.variant(stop=0.0), trained.chosen.adapter
    with artifacts.nothing_made():  # it was kept on the way
        assert early.chosen.adapter.path == run.path / "stop-0" and early.chosen.adapter.key != run.key
    assert len(early.chosen.log) == 1 and len(trained.chosen.log) == 3
    moved = [one.displacements("heldout").norm() for one in (early, trained)]
    assert 0 < moved[0] < moved[1]


@pytest.mark.parametrize("data", ["atlas:refusal", "atlas:tone+belief"])
def test_about_other_preferences_the_base_and_the_recipe_stay(trained, data):
    other = trained.about(data)
    assert other.source.key == trained.source.key and other.profile == PROFILE.replace(data=data)
    assert other.pairs["heldout"] != trained.pairs["heldout"]
    assert trained.about(PROFILE.data) is trained


# --- Several partners ---


def test_an_organism_s_weights_come_from_here(trained):
    assert trained.origin == "pretrained here"


def test_replicates_are_the_study_and_its_recipe_trained_with_other_seeds(trained):
    found = trained.replicates
    assert found[0] is trained and [r.chosen.recipe for r in found] == [RECIPE.replace(seed=k) for k in range(3)]
    assert len({tuple(r.direction().tolist()) for r in found}) == 3
    assert all(r.has(Study.measure) for r in found)
    states = [r.states("heldout") for r in found]
    for key in (key for key in states[0] if key[0] == "base"):
        assert all(torch.equal(other[key], states[0][key]) for other in states[1:])


def test_a_study_has_stages_once_all_is_there_and_asking_makes_nothing(trained):
    cache = artifacts.root()
    made, before = trained.variant(objective="sft"), set(cache.iterdir())
    assert not made.has(Study.measure) and set(cache.iterdir()) == before
    made.measure()
    assert made.has(Study.measure) and Study(made.profile).has(Study.measure)
    (partner,) = cache.glob(f"run-{made.chosen.adapter.key[:16]}")
    partner.rename(cache / "aside")
    assert not Study(made.profile).has(Study.measure)
    (cache / "aside").rename(partner)


def test_what_is_missing_is_computed_and_no_more(trained, monkeypatch):
    missing, asked = [trained.variant(seed=7), trained.variant(seed=8)], []
    monkeypatch.setattr(parallel, "each", lambda function, items, name: asked.append((items, name)))
    study.compute([missing[0], trained, missing[1]], "some partners")
    study.compute([trained], "nothing to do")
    study.compute([], "nothing at all")
    ((items, name),) = asked
    assert [item[:2] for item in items] == [(Study, made.profile) for made in missing] and name == "some partners"


def test_several_stages_of_one_study_are_computed_side_by_side(trained, monkeypatch):
    asked, directions = [], torch.eye(len(trained.direction()))[:2]
    stages = [lambda one, arm=arm: one.sweep("base", "final", directions[arm : arm + 1]) for arm in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "each", lambda function, items, name: asked.extend(items))
        study.compute([trained], "two sweeps", *stages)
    assert [(profile, one) for _, profile, one in asked] == [(trained.profile, one) for one in stages]
    study.compute([trained], "two sweeps", *stages)
    assert all(map(trained.has, stages))
    monkeypatch.setattr(subject, "_fits_beside", lambda one: False)  # a large model is not loaded beside itself
    monkeypatch.setattr(subject, "_ask", lambda kind: pytest.fail("another study was made"))
    study.compute([trained], "a third", lambda one: one.sweep("base", "final", 2 * directions[:1]))


def test_partners_of_a_large_base_are_computed_one_after_the_other_here(trained, monkeypatch):
    missing = trained.variant(labels="shuffled")
    monkeypatch.setattr(subject, "_fits_beside", lambda one: False)
    monkeypatch.setattr(parallel, "each", lambda *_: pytest.fail("several at a time"))
    assert not missing.has(Study.measure)
    study.compute([trained, missing], "one at a time")
    assert missing.has(Study.measure)


def test_other_stages_are_computed_where_they_are_asked_for(trained):
    missing = trained.variant(seed=9)
    study.compute([missing], "one adapter", lambda s: s.chosen.adapter)
    assert missing.has(lambda s: s.chosen.adapter) and not missing.has(Study.measure)


def test_what_a_cluster_left_where_it_is_not_found_here_is_told(trained, monkeypatch):
    monkeypatch.setattr(parallel, "each", lambda *_: None)
    missing = [trained, trained.variant(seed=10), trained.variant(seed=11)]
    study.compute(missing, "two partners")
    monkeypatch.setenv("DASK", "tcp://host:8786")
    with pytest.raises(FileNotFoundError, match="DASK=tcp://host:8786 are done with two partners, but 2 of 2 are not"):
        study.compute(missing, "two partners")


def test_a_partner_that_cannot_be_trained_is_told_and_not_kept(trained):
    failing = trained.variant(learning_rate=float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        study.compute([failing], "a partner that cannot be trained")
    assert not failing.has(Study.measure)


def test_a_partner_of_rank_0_is_a_model_of_its_own_beside_the_same_base(trained, plain):
    made = trained.variant(rank=0, learning_rate=1e-3)
    ids = made.encoded("heldout")[0][0].ids
    assert made.lm.both.base is not made.lm.both.dpo
    with made.lm.playing("base") as model:
        close(logits(model, ids).double(), logits(plain["base"], ids), atol=1e-4, rtol=1e-4)
    states, own = made.states("heldout"), trained.states("heldout")
    assert all(torch.equal(states[key], own[key]) for key in own if key[0] == "base")
    assert made.displacements("heldout").norm(dim=1).min() > 1e-3
    made.vector().check_fits(made.lm.both.dpo)


# --- A ready partner ---


@pytest.fixture
def merged(trained, tmp_path):
    """The partner as a checkpoint of its own."""
    dpo = AutoModelForCausalLM.from_pretrained(trained.source.path)
    PeftModel.from_pretrained(dpo, trained.chosen.adapter.path).merge_and_unload().save_pretrained(tmp_path)
    trained.lm.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def beside(trained, partner) -> Study:
    """The same base with a given partner."""
    return Study(PROFILE.replace(model=str(trained.source.path), dpo_model=str(partner)))


@pytest.fixture(params=["adapter", "whole model"])
def ready(request, trained, merged, monkeypatch):
    """The same pair of models, given and not trained."""
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained a partner"))
    return beside(trained, trained.chosen.adapter.path if request.param == "adapter" else merged)


def test_a_ready_partner_is_studied_as_the_trained_one_is_and_nothing_is_trained(ready, trained):
    assert ready.pairs == trained.pairs and not ready.trains
    close(ready.displacements("heldout"), trained.displacements("heldout"), atol=1e-4, rtol=1e-4)
    assert ready.reward_margins("heldout") == pytest.approx(trained.reward_margins("heldout"), abs=1e-3)
    assert ready.chosen.measured.keys() == trained.chosen.measured.keys()
    assert ready.replicates == [ready] and ready.recipe == RECIPE
    ready.measure()
    assert ready.has(Study.measure)
    assert ready.chosen.recipe is None and ready.chosen.log is None
    assert ready.caveat.startswith("**The DPO partner** is a ready one; how it was trained is not known here, nor")
    with pytest.raises(ValueError, match="ready one, so none like it can be trained: leave DPO_MODEL= out"):
        ready.variant(labels="shuffled")


def test_of_a_ready_partner_with_an_unembedding_of_its_own_it_is_said_by_how_much(trained, merged):
    assert "unembedding" not in beside(trained, merged).caveat
    moved = AutoModelForCausalLM.from_pretrained(merged)
    moved.lm_head.weight.data *= 1.25
    moved.save_pretrained(merged)
    assert "Its unembedding differs from the base's by 25.0% of its norm" in beside(trained, merged).caveat


def test_a_ready_partner_without_its_base_is_refused():
    with pytest.raises(ValueError, match="needs the base that it was trained from: give MODEL= too"):
        PROFILE.replace(dpo_model="a/partner")


def test_truthfulness_is_asked_once_of_a_model_that_was_not_trained_here(trained, merged, deltas, monkeypatch):
    choices = {"choices": ["It is.", "It is not."], "labels": [1, 0]}
    rows = [{"question": "Is it?", "mc1_targets": choices, "mc2_targets": choices}]
    monkeypatch.setattr(study, "truthfulqa_rows", lambda: rows)
    made = beside(trained, merged)
    found = made.truthfulness("base", deltas)
    assert [part.shape for part in found] == [(2, 1), (2, 1)] and ((found.mc2 > 0) & (found.mc2 < 1)).all()
    monkeypatch.setattr(truthfulqa, "truthfulqa", lambda *_: pytest.fail("asked again"))
    assert all((a == b).all() for a, b in zip(made.truthfulness("base", deltas), found))
