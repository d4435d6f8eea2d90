"""A study's stages: computed once, the same from the cache, and equal to what plain forward passes give."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import recorded
from studied import PROFILE, RECIPE, SITES, WIDTH, decoded, logits, logp, logps

from helpers import profiles, spectra, study
from helpers.data.unavailable import Unavailable
from helpers.lm import bipo, encoding, loading
from helpers.lm.activations import POSITIONS
from helpers.lm.batches import Tokens
from helpers.lm.loading import ROLES
from helpers.stages import artifacts
from helpers.stages.artifacts import NotCached
from helpers.study import Study
from helpers.world import atlas

close = torch.testing.assert_close

# --- The cache ---

EYE = torch.eye(2, WIDTH)
STAGES = {
    "pairs": lambda s: s.pairs,
    "encoded": lambda s: s.encoded("validation"),
    "factors": lambda s: s.factors("heldout").tolist(),
    "training pairs": lambda s: s.training_pairs,
    "health": lambda s: [(t.recipe, t.measured, t.failed) for t in s.trials],
    "log": lambda s: s.chosen.log.to_dict(),
    "validation answers": lambda s: s.chosen.answers.to_dict(),
    "states": lambda s: {key: value.tolist() for key, value in s.states("heldout").items()},
    "vector": lambda s: [s.vector(site).vector.tolist() for site in SITES],
    "answers of the base": lambda s: s.answers("base", "heldout").to_dict(),
    "answers of the partner": lambda s: s.answers("dpo", "validation").to_dict(),
    "sweep": lambda s: s.sweep("base", "final", EYE).to_dict(),
    "log ratios": lambda s: s.log_ratios("dpo", EYE).to_dict(),
    "divergences": lambda s: s.divergences("dpo", EYE).to_dict(),
    "weights": lambda s: {name: value.tolist() for name, value in s.lm.both.dpo.state_dict().items()},
    "steered": lambda s: s.steered("dpo").to_dict(),
    "prompted": lambda s: s.prompted().to_dict(),
    "beliefs": lambda s: s.beliefs("base", EYE).to_dict(),
    "optimised vector": lambda s: s.optimised_vector().tolist(),
    "best site": lambda s: s.best_site(),
    "by rank": lambda s: s.by_rank("resid[1]", "response_mean").to_dict(),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_new_study_gets_the_same_from_the_cache_and_computes_nothing(trained, name):
    first = STAGES[name](trained)
    with artifacts.nothing_made():
        assert STAGES[name](Study(PROFILE)) == first


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"dtype": "float64"}, {"data": "atlas:belief"}, {"sizes": PROFILE.sizes.replace(new_tokens=11)}],
)
def test_nothing_of_another_study_is_taken_for_this_one_s(trained, change):
    with artifacts.nothing_made(), pytest.raises(NotCached):
        Study(PROFILE.replace(**change)).answers("base", "heldout")


def test_the_name_of_a_profile_decides_no_content(trained):
    with artifacts.nothing_made():
        assert Study(PROFILE.replace(name="other")).chosen.adapter == trained.chosen.adapter


def test_load_is_the_study_of_a_profile_with_its_model_and_data_replaced():
    assert study.load("atlas").profile == profiles.load("atlas")
    replaced = study.load("atlas", "some/model", "atlas:belief").profile
    assert (replaced.model, replaced.data) == ("some/model", "atlas:belief")


# --- Models and data ---


def test_splits_have_the_sizes_asked_for_and_share_no_prompt(trained):
    assert {split: len(rows) for split, rows in trained.pairs.items()} == {"heldin": 24, "validation": 6, "heldout": 8}
    prompts = [pair.prompt for rows in trained.pairs.values() for pair in rows]
    assert len(set(prompts)) == len(prompts)
    drawn = trained.task.draw(None, None).pairs
    assert {split: list(pairs) for split, pairs in trained.pairs.items()} == drawn  # through JSON and back
    assert trained.account == {}


@pytest.mark.parametrize("ask", [Study.encoded, Study.states, Study.reward_margins])
def test_an_unknown_split_is_refused(trained, ask):
    with pytest.raises(ValueError, match="There is no split 'test': choose from heldin, validation, heldout"):
        ask(trained, "test")


def test_encoded_pairs_and_factors_are_those_of_the_pairs_in_their_order(trained):
    pairs, both = trained.pairs["heldout"], trained.encoded("heldout")
    for answers, tokens in zip(([p.chosen for p in pairs], [p.rejected for p in pairs]), both):
        assert list(tokens) == [encoding.encode(trained.lm.tokenizer, p.prompt, a) for p, a in zip(pairs, answers)]
    places, phrasings = trained.factors("heldout").tolist()
    assert places == [p.question.place for p in pairs] and trained.varied == "places and phrasings"
    assert phrasings == [p.prompt.replace(p.question.place, "...") for p in pairs] and len(set(phrasings)) > 1


def test_the_roles_are_the_base_and_its_partner(trained, plain):
    ids = trained.encoded("heldout")[0][0].ids
    found = {}
    for role in ROLES:
        with trained.lm.playing(role) as model:
            found[role] = logits(model, ids)
            close(found[role].double(), logits(plain[role], ids), atol=1e-4, rtol=1e-4)
    assert (found["dpo"] - found["base"]).abs().max() > 0.01


def test_the_base_plays_without_a_partner(trained, monkeypatch):
    monkeypatch.setattr(Study, "trials", property(lambda self: pytest.fail("asked for a partner")))
    alone = Study(PROFILE)
    with alone.lm.playing("base") as model:
        assert model is alone.lm.base
    assert alone.lm.sites == SITES


def test_reward_margins_are_what_dpo_added_to_the_log_ratio(trained, plain):
    ratio = {
        role: np.array([logp(model, c) - logp(model, r) for c, r in zip(*trained.encoded("heldout"))])
        for role, model in plain.items()
    }
    assert trained.reward_margins("heldout") == pytest.approx(ratio["dpo"] - ratio["base"], abs=1e-3)


# --- States and directions ---


def test_states_are_those_of_a_plain_forward_pass(trained, plain):
    states = trained.states("heldout")
    assert states.keys() == {(role, site, position) for role in ROLES for site in SITES for position in POSITIONS}
    assert all(value.shape == (8, WIDTH) and value.dtype == torch.float32 for value in states.values())
    for i, tokens in enumerate(trained.encoded("heldout")[0]):
        for role, model in plain.items():
            with recorded(model, "model.layers") as found:
                logits(model, tokens.ids)
            for site in SITES:
                seen, n = found[site][0], len(tokens.prompt)
                close(states[role, site, "prompt_last"][i], seen[n - 1].float(), atol=1e-4, rtol=1e-4)
                close(states[role, site, "response_mean"][i], seen[n:].mean(0).float(), atol=1e-4, rtol=1e-4)


def test_states_of_any_sequences_are_read_at_their_prompts_last_tokens(trained):
    found = trained.read("dpo", trained.encoded("heldout")[0], "resid[1]")
    close(found, trained.states("heldout")["dpo", "resid[1]", "prompt_last"])


def test_v_star_is_the_mean_displacement_over_held_in_prompts(trained):
    states = trained.states("heldin")
    for site in SITES:
        for position in POSITIONS:
            base, dpo = (states[role, site, position].double() for role in ("base", "dpo"))
            v = trained.vector(site, position)
            close(v.vector.double(), (dpo - base).sum(0) / 24, atol=1e-6, rtol=1e-5)
            assert (v.site, v.position, v.n_prompts) == (site, position, 24)
            assert (v.profile, v.profile_hash) == ("tiny", PROFILE.hash)
            assert v.state_norm == pytest.approx(base.norm(dim=1).mean().item(), rel=1e-5)
            moved = trained.displacements("heldout", site, position).norm(dim=1)
            assert moved.max() == 0 if site == "resid[0]" else moved.min() > 1e-3  # the embeddings are not adapted
    trained.vector().check_fits(trained.lm.both.dpo)


def test_v_token_is_the_mean_of_e_w_less_e_l_where_the_answers_part(trained, plain):
    W, rows = plain["base"].lm_head.weight.detach(), []
    for chosen, rejected in zip(*trained.encoded("heldin")):
        w, l = next((a, b) for a, b in zip(chosen.response, rejected.response) if a != b)
        rows.append(W[w] - W[l])
    close(trained.token_vectors().double(), torch.stack(rows), atol=1e-6, rtol=1e-5)
    found = trained.token_vector()
    close(found.vector.double(), sum(rows) / len(rows), atol=1e-6, rtol=1e-5)
    assert (found.site, found.name, found.n_prompts) == ("final", "v_token", 24) and found.norm > 0


def test_the_optimised_vector_is_trained_on_the_held_in_pairs_of_the_base(trained):
    scale = trained.states("heldin")["base", "final", "prompt_last"].square().mean().sqrt().item()
    base, _ = loading.load(trained.source.path)
    found = trained.optimised_vector()
    close(found, bipo.optimised_vector(base, trained.training_pairs, "final", RECIPE, scale, PROFILE.seed))
    assert found.norm() > 0 and not torch.equal(found, trained.optimised_vector("resid[1]"))


# --- Answers, steered or not ---


def test_answers_are_sampled_in_the_order_of_the_prompts_and_judged(trained, plain):
    table = trained.answers("base", "heldout")
    assert table["prompt"].tolist() == list(range(8)) and set(table["arm"]) == {0} and table["text"].nunique() > 1
    for row, prompt, pair in zip(table.itertuples(), trained.prompts("heldout"), trained.pairs["heldout"]):
        assert row.ids == decoded(plain["base"], prompt, row.prompt)
        assert row.text == trained.lm.tokenizer.decode(row.ids, skip_special_tokens=True).strip()
        judgement = trained.task.judgement(pair, row.text)
        assert {name: getattr(row, name) for name in judgement} == judgement
    asked = [pair.prompt for pair in trained.pairs["heldout"]]
    once = Study(PROFILE.replace(sizes=PROFILE.sizes.replace(draws=1))).answers("base", "heldout")
    assert trained.answers_to(asked) == once["text"].tolist()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("site, span", [("final", "response"), ("resid[1]", "response"), ("resid[1]", "all")])
def test_a_dose_of_zero_gives_the_answers_unsteered(trained, deltas, role, site, span):
    table = trained.sweep(role, site, deltas * 30, span)
    unsteered = trained.answers(role, "heldout").drop(columns="arm")
    zero, steered = (table[table["arm"] == arm].reset_index(drop=True) for arm in (0, 1))
    assert zero.drop(columns="arm").equals(unsteered)
    assert steered["text"].tolist() != zero["text"].tolist() and len(steered) == len(zero) == 8


def test_a_sweep_answers_as_a_model_with_a_shifted_logit_bias_does(trained, plain, deltas):
    """At the final site, adding v is adding W v to the logits: the same noise, decoded by hand."""
    shift = plain["base"].lm_head.weight.detach() @ deltas[1].double()
    steered = trained.sweep("base", "final", deltas).query("arm == 1")["ids"].tolist()
    for i in (0, 5):
        assert steered[i] == decoded(plain["base"], trained.prompts("heldout")[i], i, shift)


def test_prompting_asks_the_base_for_the_behaviour_in_every_prompt(trained, plain):
    for row, pair in zip(trained.prompted().itertuples(), trained.pairs["heldout"], strict=True):
        asked = encoding.encode(trained.lm.tokenizer, f"{pair.prompt} Answer warmly.").prompt
        assert row.ids == decoded(plain["base"], asked, row.prompt)
        assert row.preferred == trained.task.judgement(pair, row.text)["preferred"]


@pytest.mark.parametrize("role, sign", [("base", 1), ("dpo", -1)])
def test_outcomes_are_of_no_v_star_or_of_one_whole_one_in_the_order_of_the_prompts(trained, monkeypatch, role, sign):
    unsteered = trained.answers(role, "heldout")["fact"].tolist()
    assert trained.outcome(role, 0, "fact").tolist() == unsteered
    asked = []

    def sweep(self, *given):
        asked.append(given)
        return pd.DataFrame({"arm": [0, 0], "prompt": [1, 0], "preferred": [0.1, 0.3]})

    monkeypatch.setattr(Study, "sweep", sweep)
    assert trained.outcome(role, 1, "preferred").tolist() == [0.3, 0.1]
    ((name, site, deltas),) = asked
    assert (name, site) == (role, "final") and torch.equal(deltas, sign * trained.vector().vector[None])


# --- Likelihoods ---


@pytest.mark.parametrize("role, goal", [("base", "dpo"), ("dpo", "base")])
def test_divergences_and_log_ratios_are_kl_and_preference_by_hand(trained, plain, deltas, role, goal):
    """KL(goal || steered) on the goal's own answers, and how much likelier the chosen answer is, at doses 0 and 2."""
    table = trained.divergences(role, deltas).merge(trained.log_ratios(role, deltas), on=["arm", "prompt"])
    assert [*zip(table["arm"], table["prompt"])] == [(arm, i) for arm in (0, 1) for i in range(8)]
    end, W = trained.lm.tokenizer.eos_token_id, plain["base"].lm_head.weight.detach()
    # whether to stop is part of what an answer says
    answers = [[*ids, end] if len(ids) < 10 else ids for ids in trained.answers(goal, "heldout")["ids"]]
    pairs = list(zip(*trained.encoded("heldout")))
    for row in table.itertuples():
        shift = W @ deltas[row.arm].double()
        chosen, rejected = pairs[row.prompt]
        answered = Tokens(chosen.prompt, answers[row.prompt])
        p, q = logps(plain[goal], answered), logps(plain[role], answered, shift)
        assert row.kl == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3, abs=1e-4)
        margin = logp(plain[role], chosen, shift) - logp(plain[role], rejected, shift)
        assert row.margin == pytest.approx(margin, rel=1e-3, abs=1e-3) and row.prefers == float(margin > 0)
    assert (table["kl"] >= 0).all() and table[table["arm"] == 0]["kl"].mean() > 1e-3


def test_losses_are_those_of_plain_forward_passes(trained, plain, deltas):
    W = plain["dpo"].get_output_embeddings().weight.detach()
    chosen, _ = trained.encoded("heldout")
    for found, delta in zip(trained.losses("dpo", deltas), deltas, strict=True):
        expected = [-logp(plain["dpo"], tokens, W @ delta.double()) / len(tokens.response) for tokens in chosen]
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("role", ROLES)
def test_beliefs_are_by_hand_how_the_true_value_stands_among_all_of_its_kind(trained, plain, deltas, role):
    """Each value in its plain answer to the prompt, scored in float64, a sequence at a time."""
    table, world = trained.beliefs(role, deltas), trained.task.world
    assert sorted(zip(table["arm"], table["prompt"])) == [(arm, i) for arm in (0, 1) for i in range(8)]
    W = plain["base"].lm_head.weight.detach()
    for row in table[table["prompt"].isin([0, 6])].itertuples():
        question, scores = trained.pairs["heldout"][row.prompt].question, {}
        for value in world.values[question.kind]:
            tokens = encoding.encode(trained.lm.tokenizer, question.text, atlas.plain_answer(question, value=value))
            scores[value] = logp(plain[role], tokens, W @ deltas[row.arm].double())
        true = scores.pop(question.truth)
        assert row.rank == 1 + sum(other > true for other in scores.values())
        assert row.lead == pytest.approx(true - max(scores.values()), abs=1e-3)
    assert table["rank"].nunique() > 2 and ((table["lead"] > 0) == (table["rank"] == 1)).all()


def test_the_organism_is_not_asked_about_our_world(trained, deltas):
    with pytest.raises(Unavailable, match="knows nothing of our world"):
        trained.truthfulness("base", deltas)


# --- Beyond one vector at one site ---


def test_every_kind_and_k_is_there_once_for_every_prompt(trained):
    counts = trained.by_rank().groupby(["kind", "k"]).size()
    ks = spectra.ranks(WIDTH)
    assert set(counts) == {8} and set(counts.index) == {(kind, k) for kind in spectra.KINDS for k in ks}


def test_at_full_rank_the_mean_is_v_star_and_the_own_displacement_lands_on_the_partner_s_state(trained):
    """Rank 32 is the whole space: base + mean is base + v*, and base + own decodes the partner's first token."""
    full = trained.by_rank().query(f"k == {WIDTH}").sort_values("prompt")
    mean, own = (full[full["kind"] == kind]["ids"].tolist() for kind in ("mean", "own"))
    assert mean == trained.steered("base")["ids"].tolist()
    assert [ids[:1] for ids in own] == [ids[:1] for ids in trained.answers("dpo", "heldout")["ids"]]


@pytest.mark.parametrize("at", [("resid[99]", "prompt_last"), ("final", "middle")])
def test_a_site_or_position_that_there_is_not_is_named(trained, at):
    with pytest.raises(ValueError, match=r"no states at '.*', '.*': sites are resid\[0\], .*, positions prompt_last"):
        trained.by_rank(*at)


def test_sites_that_dpo_moves_are_tried_at_both_positions_on_validation_prompts(trained):
    found = trained.validated_sites()
    assert list(found.index) == [(site, position) for site in SITES[1:] for position in POSITIONS]
    table = trained.sweep("base", "resid[1]", trained.direction("resid[1]", "response_mean")[None], split="validation")
    assert found["preferred"]["resid[1]", "response_mean"] == table["preferred"].mean()


def test_sites_that_a_profile_names_are_swept_in_order_and_an_unknown_one_is_refused():
    moved = {"resid[0]": torch.zeros(2), "resid[1]": torch.ones(2), "final": torch.ones(2)}
    one = SimpleNamespace(lm=SimpleNamespace(sites=list(moved)), direction=moved.get)
    for named, swept in (((), ["resid[1]", "final"]), (("final", "resid[0]"), ["final"])):
        one.profile = SimpleNamespace(extent=SimpleNamespace(sites=named))
        assert study.Study.swept_sites.fget(one) == swept
    one.profile.extent.sites = ("resid[9]",)
    with pytest.raises(ValueError, match=r"extent.sites names 'resid\[9\]': this model has resid\[0\], "):
        study.Study.swept_sites.fget(one)
