"""A study's stages: computed once, the same from the cache, and equal to what plain forward passes give."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import recorded
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from helpers import (
    activations,
    artifacts,
    atlas,
    bipo,
    encoding,
    generation,
    judges,
    lowrank,
    metrics,
    models,
    parallel,
    preferences,
    pretraining,
    profiles,
    study,
    training,
)
from helpers.artifacts import Artifact
from helpers.profiles import Health, Organism, Recipe, Sizes
from helpers.study import Study, Trial, failed_criteria

PROFILE = replace(
    profiles.BUILT_IN["atlas"],
    name="tiny",
    organism=Organism(places=20, corpus=960, vocabulary=300, width=32, layers=2),
    recipes=(Recipe(learning_rate=1e-2, epochs=1, batch_size=8, rank=4),),
    sizes=Sizes(heldin=24, validation=6, heldout=8, new_tokens=10),
)
SITES = ["resid[0]", "resid[1]", "resid[2]", "final"]
close = torch.testing.assert_close


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def trained():
    """The study of the tiny profile, its base and its DPO partner trained."""
    made = Study(PROFILE)
    assert made.pair is not None
    return made


@pytest.fixture
def alone(trained, monkeypatch):
    """What runs inside may read the cache and make nothing."""

    def refuse(*_, **__):
        raise AssertionError("computed again")

    for module, name in (
        (pretraining, "Trainer"), (training, "_PreparedDPOTrainer"), (generation, "sample"),
        (activations, "hidden_states"), (bipo, "optimised_vector"), (parallel, "each"), (artifacts, "_write"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture(scope="module")
def deltas(trained):
    """Dose 0 and dose 2 of v* at the final site."""
    v = trained.vector().vector
    return torch.stack([0 * v, 2 * v])


@pytest.fixture(scope="module")
def plain(trained):
    """The base and the DPO model by transformers and PEFT alone, in float64 and one sequence at a time."""
    base = AutoModelForCausalLM.from_pretrained(trained.source.path).double().eval()
    dpo = AutoModelForCausalLM.from_pretrained(trained.source.path)
    dpo = PeftModel.from_pretrained(dpo, trained.chosen.adapter.path).double().eval()
    return {"base": base, "dpo": dpo.get_base_model()}


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def decoded(model, prompt, i, shift=0.0) -> list[int]:
    """The answer to prompt i, sampled by plain forward passes with the noise that is the prompt's own."""
    noise, ids = generation.GumbelNoise([i], PROFILE.seed), []
    while len(ids) < PROFILE.sizes.new_tokens:
        scores = (logits(model, prompt + ids)[-1] + shift).float()
        ids.append(noise.added(scores[None], torch.tensor([i]))[0].argmax().item())
        if ids[-1] == model.config.eos_token_id:
            return ids[:-1]
    return ids


# --- The cache ---

STAGES = {
    "examples": lambda s: s.examples,
    "encoded": lambda s: s.encoded("validation"),
    "health": lambda s: [(t.recipe, t.measured, t.failed) for t in s.trials],
    "log": lambda s: s.chosen.log.to_dict(),
    "validation answers": lambda s: s.chosen.answers.to_dict(),
    "states": lambda s: {key: value.tolist() for key, value in s.states("heldout").items()},
    "vector": lambda s: [s.vector(site).vector.tolist() for site in s.sites],
    "answers of the base": lambda s: s.answers("base", "heldout").to_dict(),
    "answers of the DPO model": lambda s: s.answers("dpo", "validation").to_dict(),
    "sweep": lambda s: s.sweep("base", "final", torch.eye(2, 32)).to_dict(),
    "log ratios": lambda s: s.log_ratios("dpo", torch.eye(2, 32)).to_dict(),
    "divergences": lambda s: s.divergences("dpo", torch.eye(2, 32)).to_dict(),
    "weights": lambda s: {name: value.tolist() for name, value in s.pair.dpo.state_dict().items()},
    "templates": lambda s: s.templates("heldout").tolist(),
    "steered": lambda s: s.steered("dpo").to_dict(),
    "prompted": lambda s: s.prompted().to_dict(),
    "beliefs": lambda s: s.beliefs("base", torch.eye(2, 32)).to_dict(),
    "optimised vector": lambda s: s.optimised_vector().tolist(),
    "replicates": lambda s: [r.outcome("base", 1, "preferred").tolist() for r in s.replicates],
    "best site": lambda s: s.best_site,
    "by rank": lambda s: s.by_rank("resid[1]", "response_mean").to_dict(),
    "divergence by rank": lambda s: s.divergence_by_rank().to_dict(),
}


@pytest.fixture(scope="module")
def first(trained):
    return {name: stage(trained) for name, stage in STAGES.items()}


@pytest.mark.parametrize("name", STAGES)
def test_a_new_study_gets_the_same_from_the_cache_and_computes_nothing(first, alone, name):
    assert STAGES[name](Study(PROFILE)) == first[name]


def test_a_study_that_is_not_in_the_cache_would_be_computed(alone):
    with pytest.raises(AssertionError, match="computed again"):
        assert Study(replace(PROFILE, seed=1)).base


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"dtype": "float64"}, {"data": "atlas:belief"}, {"sizes": replace(PROFILE.sizes, new_tokens=11)}],
)
def test_what_decides_the_values_decides_the_key(trained, monkeypatch, tmp_path, change):
    """Nothing of another study is taken for this one's: states, answers and adapters are all made from the examples."""
    keys = []
    monkeypatch.setattr(artifacts, "_write", lambda path, key, *_: keys.append(key))
    monkeypatch.setattr(artifacts, "root", lambda: tmp_path / "nowhere")
    assert Study(PROFILE)._examples.key == trained._examples.key
    assert Study(replace(PROFILE, **change))._examples.key != trained._examples.key


def test_the_name_of_a_profile_decides_no_content(trained, alone):
    assert Study(replace(PROFILE, name="other")).chosen.adapter == trained.chosen.adapter


def test_load_is_the_study_of_a_profile_with_its_model_and_data_replaced():
    assert study.load("atlas").profile == profiles.BUILT_IN["atlas"]
    assert study.load("atlas", "some/model", "atlas:belief").profile == profiles.load(
        "atlas", "some/model", "atlas:belief"
    )
    assert study.load("atlas").profile.hash != study.load("atlas", "", "atlas:belief").profile.hash


# --- Models and data ---


def test_splits_have_the_sizes_asked_for_and_share_no_prompt(trained):
    assert {split: len(rows) for split, rows in trained.examples.items()} == {
        "heldin": 24,
        "validation": 6,
        "heldout": 8,
    }
    prompts = [e.prompt for rows in trained.examples.values() for e in rows]
    assert len(set(prompts)) == len(prompts)
    assert trained.examples == trained.task.draw(None, None).examples  # through JSON and back


@pytest.mark.parametrize(
    "ask", [lambda s: s.encoded("test"), lambda s: s.sweep("base", "final", torch.zeros(1, 32), split="test")]
)
def test_an_unknown_split_is_refused(trained, ask):
    with pytest.raises(ValueError, match="There is no split 'test': choose from heldin, validation, heldout"):
        ask(trained)


def test_encoded_pairs_are_the_examples(trained):
    chosen, rejected = trained.encoded("heldout")
    for tokens, other, example in zip(chosen, rejected, trained.examples["heldout"]):
        assert tokens == encoding.encode(trained.tokenizer, example.prompt, example.chosen)
        assert other == encoding.encode(trained.tokenizer, example.prompt, example.rejected)


def test_the_roles_are_the_base_and_its_partner(trained, plain):
    ids = trained.encoded("heldout")[0][0].ids
    found = {}
    for role in models.ROLES:
        with trained.playing(role) as model:
            found[role] = logits(model, ids)
            close(found[role].double(), logits(plain[role], ids), atol=1e-4, rtol=1e-4)
    assert (found["dpo"] - found["base"]).abs().max() > 0.01


def test_the_base_plays_without_a_partner(trained, alone, monkeypatch):
    monkeypatch.setattr(Study, "trials", property(lambda self: pytest.fail("asked for a DPO partner")))
    alone_study = Study(PROFILE)
    with alone_study.playing("base") as model:
        assert model is alone_study.base
    assert alone_study.sites == SITES


def test_reward_margins_are_what_dpo_added_to_the_log_ratio(trained, plain):
    expected = []
    for pair in zip(*trained.encoded("heldout")):
        ratio = {}
        for role, model in plain.items():
            chosen, rejected = (
                logits(model, t.ids)
                .log_softmax(-1)[len(t.prompt) - 1 : -1]
                .gather(1, torch.tensor(t.response)[:, None])
                .sum()
                for t in pair
            )
            ratio[role] = (chosen - rejected).item()
        expected.append(ratio["dpo"] - ratio["base"])
    assert trained.reward_margins("heldout") == pytest.approx(np.array(expected), abs=1e-3)


def test_templates_are_the_task_s_a_prompt_each_in_order(trained):
    found = trained.templates("heldout")
    assert (
        found.tolist() == [e.question.text.replace(e.question.place, "...") for e in trained.examples["heldout"]]
        and len(set(found)) > 1
    )


# --- Other partners of the same base ---


def test_a_variant_has_the_same_base_and_pairs_and_another_partner(trained, monkeypatch):
    other = trained.variant(labels="reversed", rank=2)
    assert other.profile.recipes == (replace(PROFILE.recipes[0], labels="reversed", rank=2),)
    assert replace(other.profile, recipes=PROFILE.recipes) == PROFILE
    assert (other.source.key, other._examples.key) == (trained.source.key, trained._examples.key)
    keys = []
    monkeypatch.setattr(artifacts, "_write", lambda path, key, *_: keys.append(key))
    assert other.chosen.adapter.key in keys and trained.chosen.adapter.key not in keys


def test_what_is_the_base_s_is_shared_by_all_partners_and_nothing_of_a_partner_s_is(first, trained, alone):
    other = trained.replicates[1]
    assert other._states("base", "heldin").keys() == trained._states("base", "heldin").keys()
    for name in ("answers of the base", "prompted", "beliefs"):
        assert STAGES[name](other) == first[name]
    for name in ("answers of the DPO model", "log ratios", "divergences", "optimised vector", "health"):
        with pytest.raises(AssertionError, match="computed again"):
            STAGES[name](other)


@pytest.mark.parametrize("changes", [{}, {"rank": 4}, {"labels": "true", "objective": "dpo"}])
def test_a_variant_without_a_change_is_the_study_itself(trained, changes):
    assert trained.variant(**changes) is trained


@pytest.mark.parametrize("changes, error", [({"ranks": 2}, ValueError), ({"labels": "swapped"}, ValueError)])
def test_a_variant_that_is_no_recipe_is_refused(trained, changes, error):
    with pytest.raises(error, match=next(iter(changes))):
        trained.variant(**changes)


def test_replicates_are_the_study_and_its_recipe_trained_with_other_seeds(trained):
    found = trained.replicates
    assert len(found) == PROFILE.sizes.seeds == 3 and found[0] is trained
    assert [r.chosen.recipe for r in found] == [replace(PROFILE.recipes[0], seed=k) for k in range(3)]
    weights = {(r.chosen.adapter.path / "adapter_model.safetensors").read_bytes() for r in found}
    vectors = {tuple(r.vector().vector.tolist()) for r in found}
    assert len(weights) == len(vectors) == 3
    assert all(r.has(Study.compare) for r in found)


def test_replicates_share_the_base_s_states_bit_for_bit(trained):
    base = [{key: v for key, v in r.states("heldout").items() if key[0] == "base"} for r in trained.replicates]
    for other in base[1:]:
        assert base[0].keys() == other.keys() and all(torch.equal(base[0][key], other[key]) for key in other)


def test_a_study_has_stages_once_all_is_there_and_asking_makes_nothing(trained, cache):
    made, before = trained.variant(objective="sft"), set(cache.iterdir())
    assert not made.has(Study.compare) and set(cache.iterdir()) == before
    made.compare()
    assert made.has(Study.compare) and Study(made.profile).has(Study.compare)
    for artefact in set(cache.iterdir()) - before:  # the partner, its states and its answers
        artefact.rename(cache / "aside")
        assert not Study(made.profile).has(Study.compare)
        (cache / "aside").rename(artefact)


def test_prepare_computes_what_is_missing_and_no_more(first, trained, monkeypatch):
    missing, asked = [trained.variant(seed=7), trained.variant(seed=8)], []
    monkeypatch.setattr(parallel, "each", lambda function, items, name: asked.append((function, items, name)))
    study.prepare([missing[0], trained, missing[1]], "some partners")
    ((function, profiles_given, name),) = asked
    assert (profiles_given, name) == ([made.profile for made in missing], "some partners")
    assert (function.func, function.args) == (study._compute, (Study.compare,))
    study.prepare([trained], "nothing to do")
    study.prepare([], "nothing at all")
    assert len(asked) == 1


def test_prepare_computes_partners_of_a_large_base_one_after_the_other_here(trained, monkeypatch):
    missing = trained.variant(labels="shuffled")
    monkeypatch.setattr(parallel, "SMALL", 0)
    monkeypatch.setattr(parallel, "each", lambda *_: pytest.fail("several at a time"))
    assert not missing.has(Study.compare)
    study.prepare([trained, missing], "one at a time")
    assert missing.has(Study.compare)


def test_prepare_computes_other_stages_where_they_are_asked_for(trained):
    missing = trained.variant(seed=9)
    study.prepare([missing], "one adapter", lambda of: of.chosen.adapter)
    assert missing.has(lambda of: of.chosen.adapter) and not missing.has(Study.compare)


@pytest.mark.parametrize("data", ["atlas:refusal", "atlas:tone+belief"])
def test_about_other_preferences_the_base_and_the_recipe_stay(trained, data):
    other = trained.about(data)
    assert other.source.key == trained.source.key and other.profile.recipes == (trained.chosen.recipe,)
    assert replace(other.profile, data=PROFILE.data, recipes=PROFILE.recipes) == PROFILE
    assert other.examples["heldout"] != trained.examples["heldout"]
    assert trained.about(PROFILE.data) is trained


def test_prepare_raises_what_a_worker_raises(trained, monkeypatch):
    monkeypatch.setattr(tqdm, "__init__", vars(tqdm)["__init__"])  # put back, should the worker be this process
    failing = trained.variant(learning_rate=float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        study.prepare([failing], "a partner that cannot be trained")
    assert not failing.has(Study.compare)


def test_a_partner_of_rank_0_is_a_model_of_its_own_beside_the_same_base(trained, plain):
    made = trained.variant(rank=0, learning_rate=1e-3)
    ids = made.encoded("heldout")[0][0].ids
    assert made.pair.base is not made.pair.dpo
    with made.playing("base") as model:
        close(logits(model, ids).double(), logits(plain["base"], ids), atol=1e-4, rtol=1e-4)
    states, own = made.states("heldout"), trained.states("heldout")
    assert all(torch.equal(states[key], own[key]) for key in own if key[0] == "base")
    assert not made.displacements("heldout", "resid[0]").any()
    assert made.displacements("heldout").norm(dim=1).min() > 1e-3
    made.vector().check_fits(made.pair.dpo)


# --- States and directions ---


def test_states_are_those_of_a_plain_forward_pass(trained, plain):
    states = trained.states("heldout")
    keys = {(role, site, position) for role in models.ROLES for site in SITES for position in activations.POSITIONS}
    assert states.keys() == keys
    assert all(value.shape == (8, 32) and value.dtype == torch.float32 for value in states.values())
    for i, tokens in enumerate(trained.encoded("heldout")[0]):
        for role, model in plain.items():
            with recorded(model, "model.layers") as found:
                logits(model, tokens.ids)
            for site in SITES:
                seen, n = found[site][0], len(tokens.prompt)
                close(states[role, site, "prompt_last"][i], seen[n - 1].float(), atol=1e-4, rtol=1e-4)
                close(states[role, site, "response_mean"][i], seen[n:].mean(0).float(), atol=1e-4, rtol=1e-4)


def test_dpo_moves_no_embedding_and_every_later_state(trained):
    for position in activations.POSITIONS:
        assert not trained.displacements("heldout", "resid[0]", position).any()
        for site in SITES[1:]:
            assert trained.displacements("heldout", site, position).norm(dim=1).min() > 1e-3


def test_v_star_is_the_mean_displacement_over_held_in_prompts(trained):
    states = trained.states("heldin")
    for site in SITES:
        for position in activations.POSITIONS:
            v = trained.vector(site, position)
            moved = states["dpo", site, position].double() - states["base", site, position].double()
            close(v.vector.double(), moved.sum(0) / 24, atol=1e-6, rtol=1e-5)
            assert (v.site, v.position, v.n_prompts, v.profile, v.profile_hash) == (
                site,
                position,
                24,
                "tiny",
                trained.profile.hash,
            )
            assert v.state_norm == pytest.approx(
                np.linalg.norm(states["base", site, position].numpy(), axis=1).mean(), rel=1e-5
            )
    assert trained.vector().norm > 0
    trained.vector().check_fits(trained.pair.dpo)


def test_v_token_is_the_mean_of_e_w_less_e_l_where_the_answers_part(trained, plain):
    W, rows = plain["base"].lm_head.weight.detach(), []
    for chosen, rejected in zip(*trained.encoded("heldin")):
        w, l = next((a, b) for a, b in zip(chosen.response, rejected.response) if a != b)
        rows.append(W[w] - W[l])
    close(trained.token_vectors().double(), torch.stack(rows), atol=1e-6, rtol=1e-5)
    found = trained.token_vector()
    close(found.vector.double(), sum(rows) / len(rows), atol=1e-6, rtol=1e-5)
    assert (found.site, found.name, found.n_prompts) == ("final", "v_token", 24) and found.norm > 0


# --- Answers, steered or not ---


def test_answers_are_sampled_in_the_order_of_the_prompts_and_judged(trained):
    table = trained.answers("base", "heldout")
    assert list(table["prompt"]) == list(range(8)) and set(table["arm"]) == {0}
    assert table["text"].nunique() > 1 and table["ids"].map(len).max() <= 10
    for row, example in zip(table.itertuples(), trained.examples["heldout"]):
        assert row.text == trained.tokenizer.decode(row.ids, skip_special_tokens=True).strip()
        assert {"preferred": row.preferred, "fact": row.fact} == {
            key: value for key, value in trained.task.judge(example, row.text).items() if key in ("preferred", "fact")
        }


@pytest.mark.parametrize("role", models.ROLES)
@pytest.mark.parametrize("site, span", [("final", "response"), ("resid[1]", "response"), ("resid[1]", "all")])
def test_a_dose_of_zero_gives_the_answers_unsteered(trained, deltas, role, site, span):
    table = trained.sweep(role, site, deltas * 30, span)
    unsteered = trained.answers(role, "heldout")
    zero, steered = (table[table["arm"] == arm].reset_index(drop=True) for arm in (0, 1))
    assert zero.drop(columns="arm").equals(unsteered.drop(columns="arm"))
    assert steered["text"].tolist() != zero["text"].tolist() and len(steered) == len(zero) == 8


def test_a_sweep_answers_as_a_model_with_a_shifted_logit_bias_does(trained, plain, deltas):
    """At the final site, adding v is adding W v to the logits: the same noise, decoded by hand."""
    shift = plain["base"].lm_head.weight.detach() @ deltas[1].double()
    table = trained.sweep("base", "final", deltas)
    for i in (0, 5):
        ids = decoded(plain["base"], trained.encoded("heldout")[0][i].prompt, i, shift)
        assert table[(table["arm"] == 1) & (table["prompt"] == i)]["ids"].item() == ids


def test_prompted_answers_are_sampled_and_judged_as_any_others(trained, plain):
    table = trained.prompted()
    assert table["prompt"].tolist() == list(range(8)) and set(table["arm"]) == {0}
    for row, example in zip(table.itertuples(), trained.examples["heldout"]):
        asked = encoding.encode(trained.tokenizer, f"{example.prompt} Answer warmly.").prompt
        assert row.ids == decoded(plain["base"], asked, row.prompt)
        judged = trained.task.judge(example, row.text)
        assert {name: getattr(row, name) for name in judged} == judged


def test_prompting_asks_the_base_for_the_behaviour_in_every_prompt(trained, monkeypatch, tmp_path):
    """What is asked, since this base has read too little to heed it."""
    asked = []

    def sample(model, tokenizer, prompts, new_tokens, seed):
        asked.extend(prompts)
        return [[[7]] * len(prompts)]

    monkeypatch.setattr(generation, "sample", sample)
    monkeypatch.setattr(artifacts, "fetch", lambda _, __, write, *___: (write(tmp_path), Artifact(tmp_path, "key"))[1])
    assert len(trained.prompted()) == 8
    assert asked == [
        encoding.encode(trained.tokenizer, f"{example.prompt} Answer warmly.").prompt
        for example in trained.examples["heldout"]
    ]


def test_answers_that_a_judge_left_out_are_judged_in_the_next_session_and_not_sampled_again(
    trained, monkeypatch, tmp_path
):
    """A judge whose budget was spent says nothing of an answer: nan."""
    for needed in (trained.source, trained._examples):
        shutil.copytree(needed.path, tmp_path / needed.path.name)
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path))
    judged, spent = preferences.AtlasTask.judge, [True]

    def judge(task, example, answer):
        return judged(task, example, answer) | ({"preferred": float("nan")} if spent[0] else {})

    monkeypatch.setattr(preferences.AtlasTask, "judge", judge)
    first = Study(PROFILE).answers("base", "heldout")
    assert first["preferred"].isna().all()
    spent[0] = False
    monkeypatch.setattr(generation, "sample", lambda *_, **__: pytest.fail("sampled again"))
    assert Study(PROFILE).answers("base", "heldout")["preferred"].isna().all()  # this session has asked
    monkeypatch.setattr(artifacts, "_tried_here", set())
    again = Study(PROFILE).answers("base", "heldout")
    assert again["preferred"].notna().all() and again["ids"].tolist() == first["ids"].tolist()


@pytest.mark.parametrize("role", models.ROLES)
def test_at_dose_0_outcomes_are_those_of_the_answers_unsteered(trained, role):
    for judged in ("preferred", "fact", "text"):
        assert trained.outcome(role, 0, judged).tolist() == trained.answers(role, "heldout")[judged].tolist()


@pytest.mark.parametrize("role, sign", [("base", 1), ("dpo", -1)])
def test_dose_1_is_one_whole_v_star_added_to_the_base_or_taken_from_the_partner(trained, monkeypatch, role, sign):
    asked = []

    def sweep(self, *given):
        asked.append(given)
        return pd.DataFrame({"arm": [0, 0], "prompt": [1, 0], "preferred": [0.1, 0.3]})

    monkeypatch.setattr(Study, "sweep", sweep)
    assert trained.outcome(role, 1, "preferred").tolist() == [0.3, 0.1]  # in the order of the prompts
    ((of, site, deltas),) = asked
    assert (of, site) == (role, "final") and torch.equal(deltas, sign * trained.vector().vector[None])


def test_arms_that_add_nothing_are_not_decoded_again(trained, monkeypatch):
    decoded, sampled = [], generation.sample

    def sample(*given, **named):
        decoded.append(given[6])
        return sampled(*given, **named)

    unsteered, v = trained.answers("dpo", "validation"), torch.full((32,), 0.5)
    monkeypatch.setattr(generation, "sample", sample)
    table = trained.sweep("dpo", "resid[1]", torch.stack([0 * v, v, 0 * v, -v]), split="validation")
    assert len(decoded) == 1 and torch.equal(decoded[0], torch.stack([v, -v]))
    for arm in (0, 2):
        assert table[table["arm"] == arm]["ids"].tolist() == unsteered["ids"].tolist()
    assert table[table["arm"] == 1]["ids"].tolist() != table[table["arm"] == 3]["ids"].tolist()
    still = trained.sweep("dpo", "resid[1]", torch.zeros(2, 32), split="validation")
    assert len(decoded) == 1 and still["ids"].tolist() == 2 * unsteered["ids"].tolist()


# --- Beyond one vector at one site ---


@pytest.fixture(scope="module")
def ranked(trained):
    return trained.by_rank()


def test_at_full_rank_the_mean_is_v_star_and_the_own_displacement_lands_on_the_dpo_state(trained, ranked):
    """rank 32 is the whole space: base + mean is base + v*, and base + own decodes the DPO model's first token."""
    full = ranked[ranked["k"] == 32].sort_values("prompt")
    mean, own = (full[full["kind"] == kind] for kind in ("mean", "own"))
    assert mean["ids"].tolist() == trained.steered("base").sort_values("prompt")["ids"].tolist()
    assert [ids[:1] for ids in own["ids"]] == [ids[:1] for ids in trained.answers("dpo", "heldout")["ids"]]


@pytest.mark.parametrize("at", [("resid[99]", "prompt_last"), ("final", "middle")])
def test_a_site_or_position_that_there_is_not_is_named(trained, at):
    with pytest.raises(ValueError, match=r"no states at '.*', '.*': sites are resid\[0\], .*, positions prompt_last"):
        trained.by_rank(*at)


def test_every_kind_and_k_is_there_once_for_every_prompt(ranked):
    counts = ranked.groupby(["kind", "k"]).size()
    assert set(counts) == {8} and set(counts.index) == {(kind, k) for kind in lowrank.KINDS for k in lowrank.ranks(32)}


def test_rank_k_deltas_are_by_hand_projections_on_the_singular_directions(trained):
    found = trained._rank_deltas("resid[1]", "response_mean")
    at = ("resid[1]", "response_mean")
    heldin, heldout = (trained.displacements(split, *at).double().numpy() for split in ("heldin", "heldout"))
    U = np.linalg.svd(heldin, full_matrices=False)[2]
    for j, k in enumerate([1, 2, 3, 4, 8, 16]):
        P = U[:k].T @ U[:k]
        np.testing.assert_allclose(found["own"][j].numpy(), heldout @ P, atol=1e-5)
        np.testing.assert_allclose(found["mean"][j].numpy(), np.tile(heldin.mean(0) @ P, (8, 1)), atol=1e-5)
        fitted = found["fitted"][j].double().numpy()
        np.testing.assert_allclose(fitted, fitted @ P, atol=1e-4)


def test_the_divergence_by_rank_is_that_of_the_same_deltas(trained):
    table, v = trained.divergence_by_rank(), trained.direction()
    at_v = trained.divergences("base", v[None])["kl"].to_numpy()
    full = table[(table["kind"] == "mean") & (table["k"] == 32)].sort_values("prompt")["kl"].to_numpy()
    assert full == pytest.approx(at_v, rel=1e-3, abs=1e-5)
    unsteered = table[(table["kind"] == "none") & (table["k"] == 0)].sort_values("prompt")["kl"].to_numpy()
    assert unsteered == pytest.approx(trained.divergences("base", 0 * v[None])["kl"].to_numpy(), rel=1e-3, abs=1e-5)
    own = table[(table["kind"] == "own") & (table["k"] == 32)]["kl"].to_numpy()
    assert not np.allclose(own, full, rtol=1e-2)


@pytest.mark.parametrize(
    "preferred, well_formed, chosen",
    [
        # of six answers; two positions at resid[1], resid[2] and final; at resid[0] DPO moves nothing
        ([6, 1, 2, 5, 0, 1], [6] * 6, ("resid[1]", "prompt_last")),
        ([6, 1, 2, 5, 0, 1], [2, 6, 6, 6, 6, 6], ("resid[2]", "response_mean")),
        ([6] * 4 + [0, 0], [2] * 4 + [6, 6], ("final", "prompt_last")),  # no other leaves the text whole
        ([4, 1, 2, 1, 3, 4], [6] * 6, ("final", "prompt_last")),  # no other is ahead beyond chance
    ],
)
def test_the_best_site_is_better_than_final_beyond_chance_and_leaves_text_as_it_was(
    trained, monkeypatch, preferred, well_formed, chosen
):
    values = iter(zip(preferred, well_formed))

    def sweep(self, role, site, deltas, span="response", split="heldout"):
        assert (role, split, len(deltas)) == ("base", "validation", 2)
        rows = [
            {"arm": arm, "preferred": float(i < p), "well_formed": float(i < w), "ids": [7] if i else []}
            for arm in (0, 1) for p, w in [next(values)] for i in range(6)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    own = pd.DataFrame({"ids": [[]] * 6, "well_formed": [1.0] * 5 + [0.0]})
    monkeypatch.setattr(Study, "sweep", sweep)
    monkeypatch.setattr(Study, "answers", lambda *_: own)
    made = Study(PROFILE)
    assert made.best_site == chosen
    found = made.validated_sites
    assert found["preferred"].tolist() == pytest.approx([p / 6 for p in preferred])
    assert found["fluent"].tolist() == [w == 6 for w in well_formed] and set(found["changed"]) == {5 / 6}


@pytest.mark.parametrize("role", models.ROLES)
def test_beliefs_are_by_hand_how_the_true_value_stands_among_all_of_its_kind(trained, plain, deltas, role):
    """Each value in its plain answer to the prompt, scored in float64, a sequence at a time."""
    table = trained.beliefs(role, deltas)
    assert sorted(zip(table["arm"], table["prompt"])) == [(arm, i) for arm in (0, 1) for i in range(8)]
    W, world = plain["base"].lm_head.weight.detach(), trained.task.world
    for row in table[table["prompt"].isin([0, 3, 6])].itertuples():
        question, scores = trained.examples["heldout"][row.prompt].question, {}
        for value in world.values[question.kind]:
            answer = atlas.ANSWERS[question.kind].format(place=question.place, value=value)
            tokens = encoding.encode(trained.tokenizer, question.text, answer)
            read = logits(plain[role], tokens.ids)[len(tokens.prompt) - 1 : -1] + W @ deltas[row.arm].double()
            scores[value] = read.log_softmax(-1).gather(1, torch.tensor(tokens.response)[:, None]).sum().item()
        true = scores.pop(question.truth)
        assert row.rank == 1 + sum(other > true for other in scores.values())
        assert row.lead == pytest.approx(true - max(scores.values()), abs=1e-3)
    assert table["rank"].nunique() > 2 and ((table["lead"] > 0) == (table["rank"] == 1)).all()


def test_the_optimised_vector_is_trained_on_the_held_in_pairs_of_the_base(trained, monkeypatch):
    scale = trained.states("heldin")["base", "final", "prompt_last"].numpy()
    expected = bipo.optimised_vector(
        models.load(trained.source.path)[0], trained.pairs, "final", PROFILE.recipes[0],
        float(np.sqrt((scale**2).mean())), PROFILE.seed,
    )  # fmt: skip
    found = trained.optimised_vector()
    close(found, expected)
    assert found.norm() > 0 and not torch.equal(found, trained.optimised_vector("resid[1]"))


@pytest.mark.parametrize("role, goal", [("base", "dpo"), ("dpo", "base")])
def test_divergences_and_log_ratios_are_kl_and_preference_by_hand(trained, plain, deltas, role, goal):
    """KL(goal || steered) on the goal's own answers, and how much likelier the chosen answer is, at doses 0 and 2."""
    table = trained.divergences(role, deltas).merge(trained.log_ratios(role, deltas), on=["arm", "prompt"])
    assert [*zip(table["arm"], table["prompt"])] == [(arm, i) for arm in (0, 1) for i in range(8)]
    answers = trained.answers(goal, "heldout")["ids"]
    end, longest = trained.tokenizer.eos_token_id, PROFILE.sizes.new_tokens

    def ended(ids):  # whether to stop is part of what an answer says
        return [*ids, end] if len(ids) < longest else ids

    pairs = list(zip(*trained.encoded("heldout")))
    W = plain["base"].lm_head.weight.detach()
    for row in table.itertuples():
        shift = W @ deltas[row.arm].double()

        def logp(model, tokens, shift=shift):
            scores = logits(model, tokens.ids)[len(tokens.prompt) - 1 : -1] + shift
            return scores.log_softmax(-1)

        answered = activations.Tokens(pairs[row.prompt][0].prompt, ended(answers[row.prompt]))
        p, q = logp(plain[goal], answered, 0.0), logp(plain[role], answered)
        assert row.kl == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3, abs=1e-4)
        chosen, rejected = (
            logp(plain[role], tokens).gather(1, torch.tensor(tokens.response)[:, None]).sum().item()
            for tokens in pairs[row.prompt]
        )
        assert row.margin == pytest.approx(chosen - rejected, rel=1e-3, abs=1e-3)
        assert row.prefers == float(chosen > rejected)
    assert (table["kl"] >= 0).all() and table[table["arm"] == 0]["kl"].mean() > 1e-3


# --- Health and choice ---

HEALTHY = {"reward_accuracy": 0.95, "preferred": 0.8, "fact_loss": 0.05, "well_formed": 0.97}


@pytest.mark.parametrize(
    "name, value", [("reward_accuracy", 0.94), ("preferred", 0.79), ("fact_loss", 0.06), ("well_formed", 0.96)]
)
def test_each_criterion_can_fail(name, value):
    limits = Health(0.95, 0.8, 0.05, 0.97, 2.0)
    assert failed_criteria(HEALTHY, limits) == []  # a value at its limit is healthy
    assert failed_criteria({**HEALTHY, name: value}, limits) == [name]
    assert failed_criteria({name: float("nan")}, limits) == [name]


def test_text_without_rules_has_its_own_criterion():
    limits = Health(max_perplexity_ratio=2.0)
    assert failed_criteria({"perplexity_ratio": 2.0}, limits) == []
    assert failed_criteria({"perplexity_ratio": 2.1}, limits) == ["perplexity_ratio"]


def test_health_is_measured_on_validation_prompts(trained):
    measured, dpo = trained.chosen.measured, trained.answers("dpo", "validation")
    base = trained.answers("base", "validation")
    assert measured["preferred"] == pytest.approx(dpo["preferred"].mean())
    assert measured["well_formed"] == pytest.approx(dpo["well_formed"].mean())
    assert measured["fact_loss"] == pytest.approx(base["fact"].mean() - dpo["fact"].mean())
    assert measured["reward_accuracy"] == pytest.approx((trained.reward_margins("validation") > 0).mean())
    assert trained.chosen.answers["text"].tolist() == dpo["text"].tolist()
    assert trained.chosen.failed == failed_criteria(measured, PROFILE.health)


@pytest.mark.parametrize(
    "failures, tried, chosen",
    [
        ([0], 1, 0),
        ([2, 0, 0], 2, 1),  # the first healthy one, and the rest is not tried
        ([2, 1, 3], 3, 1),  # none is healthy: the fewest failures
        ([1, 2, 1], 3, 0),  # the first of equals
    ],
)
def test_recipes_are_tried_in_order_up_to_the_first_healthy_one(monkeypatch, failures, tried, chosen):
    recipes = tuple(Recipe(beta=float(i)) for i in range(len(failures)))
    fails = dict(zip(recipes, failures))
    trial = staticmethod(lambda recipe: SimpleNamespace(recipe=recipe, failed=["criterion"] * fails[recipe]))
    monkeypatch.setattr(Study, "_trial", trial)
    made = Study(replace(PROFILE, recipes=recipes))
    assert [t.recipe for t in made.trials] == list(recipes[:tried])
    assert made.chosen.recipe == recipes[chosen] and made.chosen is made.trials[chosen]


def test_the_recipe_of_a_study_of_one_is_known_without_training_and_so_are_its_variants(monkeypatch):
    monkeypatch.setattr(Study, "_trial", lambda *_: pytest.fail("trained a partner"))
    made = Study(PROFILE)
    assert made.recipe == PROFILE.recipes[0]
    assert made.variant(seed=3).recipe == replace(PROFILE.recipes[0], seed=3)
    assert made.about("atlas:belief").variant(seed=3).about(PROFILE.data).profile == made.variant(seed=3).profile


def unexamined() -> Trial:
    return Trial(PROFILE.recipes[0], None, lambda: pytest.fail("examined its health"), PROFILE.health)


def test_a_study_of_one_recipe_takes_it_unexamined(monkeypatch):
    monkeypatch.setattr(Study, "_trial", lambda self, recipe: unexamined())
    made = Study(PROFILE)
    assert [trial.recipe for trial in made.trials] == [made.chosen.recipe] == list(PROFILE.recipes)


def test_a_study_of_several_recipes_examines_them(monkeypatch):
    monkeypatch.setattr(Study, "_trial", lambda self, recipe: unexamined())
    with pytest.raises(pytest.fail.Exception, match="examined its health"):
        assert Study(replace(PROFILE, recipes=(Recipe(), Recipe(beta=0.1)))).chosen


def test_a_trial_is_examined_when_it_is_first_asked_and_once(tmp_path):
    (tmp_path / "health.json").write_text(json.dumps({"preferred": 0.1}))
    (tmp_path / "answers.json").write_text(json.dumps({"text": ["It is."]}))
    asked = []
    trial = Trial(Recipe(), None, lambda: asked.append(1) or Artifact(tmp_path, "key"), Health())
    assert asked == []
    assert (trial.measured, trial.failed) == ({"preferred": 0.1}, ["preferred"])
    assert trial.answers["text"].tolist() == ["It is."] and asked == [1]


@pytest.mark.parametrize("nll, failed", [(0.0, []), (20.0, ["well_formed"])])
def test_what_has_to_be_known_of_the_partner_is_said(monkeypatch, nll, failed):
    log = pd.DataFrame({"loss": [9.0] * 5 + [2.5] * 10, "rewards/margins": [0.0] * 15})
    trial = SimpleNamespace(recipe=Recipe(beta=0.5, nll_weight=nll), failed=failed, log=log, processes=1)
    monkeypatch.setattr(Study, "chosen", trial)
    said = Study(PROFILE).partner
    assert "β = 0.5" in said and "processes" not in said and ("20 × the negative log-likelihood" in said) == bool(nll)
    assert ("the loss is 2.50; the sigmoid term at their mean margins is 0.69 nats of it" in said) == bool(nll)
    assert ("**fails** well_formed" in said) == bool(failed) and ("healthy" in said) == (not failed)


# --- A ready partner ---


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    """The DPO model as a checkpoint of its own, and the base's folder."""
    folder = tmp_path_factory.mktemp("merged")
    dpo = AutoModelForCausalLM.from_pretrained(trained.source.path)
    PeftModel.from_pretrained(dpo, trained.chosen.adapter.path).merge_and_unload().save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["adapter", "whole model"])
def ready(request, trained, merged, monkeypatch):
    """The same pair, given and not trained."""
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained a partner"))
    partner = trained.chosen.adapter.path if request.param == "adapter" else merged
    return Study(replace(PROFILE, model=str(trained.source.path), dpo_model=str(partner)))


def test_a_ready_partner_is_studied_as_the_trained_one_is_and_nothing_is_trained(ready, trained):
    assert ready.examples == trained.examples and not ready.trains
    close(ready.displacements("heldout"), trained.displacements("heldout"), atol=1e-4, rtol=1e-4)
    close(ready.direction(), trained.direction(), atol=1e-4, rtol=1e-4)
    assert ready.reward_margins("heldout") == pytest.approx(trained.reward_margins("heldout"), abs=1e-3)
    assert ready.chosen.measured.keys() == trained.chosen.measured.keys()
    assert ready.replicates == [ready] and ready.has(Study.compare) is False
    ready.compare()
    assert ready.has(Study.compare)


def test_of_a_ready_partner_it_is_said_that_its_training_is_not_known(ready):
    assert ready.chosen.recipe is None and ready.chosen.log is None
    assert ready.partner.startswith("**The DPO partner** is a ready one; how it was trained is not known here, nor")
    with pytest.raises(ValueError, match="ready one, so none like it can be trained: leave DPO_MODEL= out"):
        ready.variant(labels="shuffled")


def test_of_a_ready_partner_with_an_unembedding_of_its_own_it_is_said_by_how_much(trained, merged, tmp_path):
    moved = AutoModelForCausalLM.from_pretrained(merged)
    moved.lm_head.weight.data *= 1.25
    moved.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    said = {partner: Study(replace(PROFILE, model=str(trained.source.path), dpo_model=str(partner))).partner
            for partner in (tmp_path, merged)}  # fmt: skip
    assert "Its unembedding differs from the base's by 25.0% of its norm" in said[tmp_path]
    assert "unembedding" not in said[merged]


def test_a_ready_partner_without_its_base_is_refused(merged):
    with pytest.raises(ValueError, match="needs the base that it was trained from: give MODEL= too"):
        replace(PROFILE, dpo_model=str(merged))


def test_kl_is_the_same_however_many_answers_are_kept_in_memory(trained, deltas, monkeypatch, cache):
    together = trained.divergences("base", deltas)
    monkeypatch.setattr(metrics, "MAX_LOGITS", 1)
    calls, kl = [], Study._kl
    monkeypatch.setattr(Study, "_kl", lambda self, *given: calls.append(len(given[2])) or kl(self, *given))
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(cache / "apart"))
    shutil.copytree(trained.source.path, cache / "apart" / trained.source.path.name)
    for needed in (trained._examples, trained.chosen.adapter):
        shutil.copytree(needed.path, cache / "apart" / needed.path.name)
    apart = trained.divergences("base", deltas)
    assert calls == [1] * 8 and apart["kl"].tolist() == pytest.approx(together["kl"].tolist(), abs=1e-5)


# --- On open text ---


def test_losses_are_those_of_plain_forward_passes(trained, plain, deltas):
    found = trained.losses("dpo", deltas)
    W = plain["dpo"].get_output_embeddings().weight
    for arm, delta in enumerate(deltas):
        for i, tokens in enumerate(trained.encoded("heldout")[0]):
            shifted = logits(plain["dpo"], tokens.ids)[len(tokens.prompt) - 1 : -1] + W @ delta.double()
            expected = torch.nn.functional.cross_entropy(shifted, torch.tensor(tokens.response))
            assert found[arm, i] == pytest.approx(expected.item(), abs=1e-4)


def test_the_organism_is_not_asked_about_our_world(trained, deltas):
    with pytest.raises(judges.Unavailable, match="knows nothing of our world"):
        trained.truthfulness("base", deltas)


def test_truthfulness_is_asked_once_of_a_model_that_was_not_trained_here(ready, deltas, monkeypatch):
    choices = {"choices": ["It is.", "It is not."], "labels": [1, 0]}
    rows = [{"question": "Is it?", "mc1_targets": choices, "mc2_targets": choices}]
    monkeypatch.setattr(judges, "truthfulqa_rows", lambda: rows)
    found = ready.truthfulness("base", deltas)
    assert [of.shape for of in found] == [(2, 1), (2, 1)] and ((found.mc2 > 0) & (found.mc2 < 1)).all()
    monkeypatch.setattr(judges, "truthfulqa", lambda *_: pytest.fail("asked again"))
    assert all((a == b).all() for a, b in zip(ready.truthfulness("base", deltas), found))
