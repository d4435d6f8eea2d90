"""Ways to steer at equal KL: each by plain forward passes, that the KL is equal, and what is measured of each."""

import numpy as np
import pytest
import torch
from conftest import recorded
from studied import PROFILE, logp, logps

from helpers import estimates
from helpers.experiments import methods
from helpers.lm import encoding
from helpers.lm.adapters import NoPlainAdapter
from helpers.stages.interventions import scaled
from helpers.stages.sampled import sampled
from helpers.study import Study

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def directions(trained):
    """v*, v_token and one that the base's states have no part in."""
    d = len(trained.direction())
    other = torch.randn(d, generator=torch.Generator().manual_seed(3))
    return torch.stack([trained.direction(), trained.token_vector().vector, other])


@pytest.fixture(scope="module")
def ways(trained, directions):
    vectors = dict(zip(("v*", "v_token", "other"), directions))
    return methods.Ways(trained, vectors, {"DPO": trained.lm.role("dpo")}, words=True)


def test_the_mean_difference_of_answers_states_is_that_of_a_double_loop(trained, plain):
    both, total = trained.encoded("heldin"), np.zeros(len(trained.direction()))
    for chosen, rejected in zip(*both):
        for sign, tokens in ((1, chosen), (-1, rejected)):
            with recorded(plain["base"], "model.layers") as found, torch.no_grad():
                plain["base"](input_ids=torch.tensor([tokens.ids]))
            read = found["final"][0].numpy()
            for t in range(len(tokens.prompt), len(tokens.ids)):
                total += sign * read[t] / len(tokens.response) / len(both[0])
    chosen, rejected = methods.answer_states(trained)
    np.testing.assert_allclose((chosen - rejected).mean(0).numpy(), total, atol=1e-4)


def test_another_preference_is_one_about_something_else(trained):
    name, one = methods.unlike(trained)
    assert (name, one.profile.data) == ("refusal", "atlas:refusal") and one.source == trained.source
    of_refusal = Study(PROFILE.replace(data="atlas:refusal"))
    assert methods.unlike(of_refusal)[0] == "tone"
    assert methods.unlike(Study(PROFILE.replace(extent=PROFILE.extent.replace(alone=True)))) is None


# --- Equal KL ---


def test_kl_of_a_model_is_an_explicit_sum_over_the_base_s_own_answers(trained, plain):
    found = methods.kl_of(trained, trained.lm.role("dpo"))
    for i, tokens in enumerate(trained.answered("base", trained.prompts("validation"))):
        p, q = (logps(plain[role], tokens) for role in ("dpo", "base"))
        assert found[i] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0, 1.7])
def test_a_scaled_adapter_has_the_kl_that_was_asked_for(trained, share):
    dpo = trained.lm.role("dpo")
    own = methods.kl_of(trained, dpo).mean()
    scale = methods.adapter_scale(trained, share * own)
    assert methods.kl_of(trained, scaled(dpo, scale)).mean() == pytest.approx(share * own, rel=5e-3)
    assert (scale > 1) == (share > 1) or scale == pytest.approx(1, abs=1e-3)


def test_an_adapter_that_never_gets_so_far_is_left_at_the_largest_scale(trained, monkeypatch):
    monkeypatch.setattr(methods, "kl_of", lambda s, role: np.array([float(role.name.split()[-1])]))
    assert methods.adapter_scale(trained, 1e3) == methods.LARGEST
    assert methods.adapter_scale(trained, 3.0) == pytest.approx(3.0, rel=0.01)


def test_a_partner_without_an_adapter_is_refused(trained):
    whole = Study(PROFILE.replace(name="whole", recipe=PROFILE.recipe.replace(rank=0, learning_rate=1e-3)))
    with pytest.raises(NoPlainAdapter, match="is a whole model and no adapter"):
        methods.adapter_scale(whole, 0.1)


# --- What each does ---


def test_answers_of_each_way_are_those_of_its_own_call(trained, directions, ways):
    found = ways.answers()
    assert list(found) == ["base", "v*", "v_token", "other", "DPO", "prompting"]
    expected = {"base": trained.answers("base", "heldout"), "DPO": trained.answers("dpo", "heldout")}
    expected |= {"v*": trained.steered("base"), "prompting": trained.prompted()}
    expected["other"] = trained.sweep("base", "final", directions[2:])
    for way, table in expected.items():
        assert found[way]["text"].tolist() == table["text"].tolist()
        assert found[way]["preferred"].tolist() == table["preferred"].tolist()


def test_on_another_preference_s_prompts_its_own_judge_is_asked_and_words_are_left_out(trained, ways):
    one = methods.unlike(trained)[1]
    found = ways.answers(one)
    assert list(found) == ["base", "v*", "v_token", "other", "DPO"]
    assert found["base"]["preferred"].tolist() == one.answers("base", "heldout")["preferred"].tolist()
    said = sampled(trained.lm.role("dpo"), one.prompts("heldout"), 10, PROFILE.seed, 2).first()
    assert found["DPO"]["ids"].tolist() == said


def test_leads_are_those_of_every_fourth_prompt(trained, directions, ways):
    found = ways.leads()
    for way, role in (("base", "base"), ("DPO", "dpo")):
        np.testing.assert_allclose(found[way], trained.lead(role), atol=1e-5)
    every = trained.beliefs("base", directions)
    for arm, way in enumerate(ways.vectors):
        np.testing.assert_allclose(found[way], estimates.by_prompt(every, "lead", arm=arm)[::4], atol=1e-4)


def test_words_ask_for_nothing_where_facts_are_asked_apart(trained, ways, monkeypatch):
    monkeypatch.setattr(type(trained.task), "has_facts", False)
    assert list(ways.leads()) == ["base", "v*", "v_token", "other", "DPO"]


def asked(trained, i, answer):
    pair = trained.pairs["heldout"][i]
    return encoding.encode(trained.lm.tokenizer, trained.task.asked_for(pair), answer)


def test_with_words_leads_and_margins_are_of_the_prompt_that_asks(trained, plain, ways):
    pair = trained.pairs["heldout"][4]
    true, *others = (logp(plain["base"], asked(trained, 4, stated)) for stated in trained.task.stated(pair))
    assert ways.leads()["prompting"][1] == pytest.approx(true - max(others), abs=1e-4)
    chosen, rejected = (logp(plain["base"], asked(trained, 4, answer)) for answer in (pair.chosen, pair.rejected))
    assert ways.margins()["prompting"][4] == pytest.approx(chosen - rejected, abs=1e-4)


def test_margins_are_differences_of_log_probabilities(trained, plain, directions, ways):
    found, (chosen, rejected) = ways.margins(), trained.encoded("heldout")
    shift = plain["base"].get_output_embeddings().weight @ directions[2].double()
    for way, model, by in (("base", "base", 0.0), ("DPO", "dpo", 0.0), ("other", "base", shift)):
        expected = logp(plain[model], chosen[2], by) - logp(plain[model], rejected[2], by)
        assert found[way][2] == pytest.approx(expected, abs=1e-3)
    assert list(found) == ["base", "v*", "v_token", "other", "DPO", "prompting"]
