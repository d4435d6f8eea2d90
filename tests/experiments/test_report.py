"""The one page about a pair: its numbers by plain forward passes, its sentence on made tables, on prompts alone."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import recorded
from studied import PROFILE, SITES, logps

from helpers import profiles, study
from helpers.experiments import report
from helpers.lm import decoding
from helpers.lm.batches import Tokens
from helpers.stages.tilted import tilted_divergences

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def kl(trained):
    return report.kl_by_token(trained)


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory):
    """The tiny base and its partner as a ready pair, on prompts alone."""
    path = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    asked = dict.fromkeys(pair.prompt for split in trained.pairs.values() for pair in split)
    path.write_text("".join(json.dumps({"prompt": prompt, "comment": "none"}) + "\n" for prompt in asked))
    sizes = PROFILE.sizes.replace(heldin=8, validation=4, heldout=8)
    chosen = {"model": str(trained.source.path), "dpo_model": str(trained.chosen.adapter.path)}
    return study.OfPrompts(PROFILE.replace(name="asked", data=f"prompts:{path}", sizes=sizes, **chosen))


def test_the_page_says_whose_it_is_and_which_organism(trained):
    assert report.about(trained) == (
        f"Base **the organism of {PROFILE.organism.places} places**; partner **trained here**; data **{PROFILE.data}**."
    )


def test_states_move_as_far_as_plain_forward_passes_say(trained, plain):
    read = trained.encoded("heldout")[0]
    norms = {"delta": [], "base": []}
    for tokens in read:
        at = {}
        for role, model in plain.items():
            with recorded(model, "model.layers") as found, torch.no_grad():
                model(input_ids=torch.tensor([tokens.ids]))
            at[role] = found["resid[2]"][0, len(tokens.prompt) - 1]
        norms["delta"].append((at["dpo"] - at["base"]).norm().item())
        norms["base"].append(at["base"].norm().item())
    found = report.moved(trained)
    assert list(found.index) == SITES
    assert found.loc["resid[2]", "prompt_last"] == pytest.approx(np.mean(norms["delta"]) / np.mean(norms["base"]), 1e-4)
    assert (found["rounding"] < 1e-5).all() and found.loc["resid[0]", "prompt_last"] == 0


def test_kl_is_that_of_plain_forward_passes_token_by_token(trained, plain, kl):
    prompts = trained.prompts("heldout")
    answered = trained.answered("dpo", prompts)
    v = plain["base"].get_output_embeddings().weight @ trained.direction().double()
    for arm, shift in (("nothing", 0.0), ("v*", v)):
        p, q = logps(plain["dpo"], answered[3]), logps(plain["base"], answered[3], shift)
        expected = (p.exp() * (p - q)).sum(-1).detach()
        found = kl[(kl["arm"] == arm) & (kl["prompt"] == 3)].sort_values("token")["kl"]
        close(torch.tensor(found.to_numpy()), expected, atol=1e-5, rtol=1e-4)


def test_kl_adds_up_to_the_strength_of_the_partner(trained, kl):
    summed = kl.groupby(["arm", "prompt"])["kl"].sum()
    np.testing.assert_allclose(summed["nothing"], trained.strength()[0], rtol=1e-4, atol=1e-6)  # as float32 rounds it
    np.testing.assert_allclose(summed["v*"], trained.strength()[1], rtol=1e-4, atol=1e-6)  # as float32 rounds it
    lengths = ["", *(f" × {length:g}" for length in report.LENGTHS[1:])]
    random = {f"random {i}{length}" for i in range(report.RANDOM) for length in lengths}
    assert set(summed.index.levels[0]) == {"nothing", "v*", "v_opt"} | random
    assert (summed["nothing"] != summed["random 3 × -0.5"]).all()


def test_v_opt_leaves_less_than_v_star_where_it_was_found(trained):
    prompts, v = trained.prompts("heldin"), report.vectors(trained)
    answered = trained.answered("dpo", prompts)
    base, dpo = (trained.lm.role(role) for role in ("base", "dpo"))
    left = tilted_divergences(base, dpo, answered, torch.stack(list(v.values()))).groupby("arm")["kl"].sum()
    assert list(v) == ["v*", "v_opt"] and left[1] < left[0]


def test_random_directions_are_as_strong_as_v_star(trained):
    vectors = torch.cat([trained.direction()[None], report.by_chance(trained)])
    kl = trained.drift(vectors)
    np.testing.assert_allclose(kl[1:], kl[0], rtol=0.01)


def test_shares_of_displacement_and_kl_are_what_they_are_called(trained, kl):
    found, delta, v = (
        report.shares(trained, kl),
        trained.displacements("heldout").double(),
        trained.direction().double(),
    )
    explained = 1 - ((delta - v) ** 2).sum() / (delta**2).sum()
    assert found.loc["of squared displacement, v*", "value"] == pytest.approx(explained.item())
    summed = kl.groupby("arm")["kl"].sum()
    assert found.loc["of KL, v_opt", "value"] == pytest.approx(1 - summed["v_opt"] / summed["nothing"])
    largest = 1 - summed[[f"random {i}" for i in range(report.RANDOM)]].min() / summed["nothing"]
    assert found.loc["of KL, v*", "chance"] == pytest.approx(largest)
    largest = 1 - summed[summed.index.str.startswith("random")].min() / summed["nothing"]
    assert found.loc["of KL, v_opt", "chance"] == pytest.approx(largest)
    told = found[~found.index.str.startswith("of behaviour")]  # of which the tiny partner shows none
    assert (
        (told["low"] <= told["value"]).all() and (told["value"] <= told["high"]).all() and len(told) == len(found) - 2
    )


def test_an_average_by_position_is_over_the_answers_that_reach_it(trained, kl):
    found = report.by_position(trained, kl)
    some = kl[(kl["arm"] == "v*") & (kl["token"] == 1)]["kl"]
    row = found[(found["arm"] == "v*") & (found["token"] == 1)].iloc[0]
    assert row["value"] == pytest.approx(some.mean()) and row["low"] <= row["value"] <= row["high"]
    assert set(found["arm"]) == {"nothing", "v*", "v_opt", "random"}
    strong = kl[kl["arm"].str.startswith("random ")]
    best = strong[strong["arm"] == strong.groupby("arm")["kl"].sum().idxmin()]
    row = found[(found["arm"] == "random") & (found["token"] == 0)].iloc[0]
    assert row["value"] == pytest.approx(best[best["token"] == 0]["kl"].mean())
    others = report.by_position(trained, kl[~kl["arm"].str.startswith("random")])  # as the ladder asks
    pd.testing.assert_frame_equal(others, found[found["arm"] != "random"].reset_index(drop=True))


def test_where_there_are_few_prompts_an_average_is_over_all_of_them(trained, kl, monkeypatch):
    monkeypatch.setattr(report, "FEWEST", 10_000)
    reached = kl[kl["arm"] == "v*"].groupby("token").size()
    found = report.by_position(trained, kl)
    assert set(found["token"]) == set(reached[reached == reached[0]].index) >= {0}


@pytest.mark.parametrize(
    "low, high, said",
    [(0.81, 0.95, "nearly all of"), (0.5, 0.95, "part of"), (-0.1, 0.19, "hardly any of"), (0.1, 0.3, "part of")],
)
def test_the_sentence_follows_from_the_interval_of_the_best_vector(low, high, said):
    rows = {"of KL, v*": [0.1, 0.0, 0.2, 0.02], "of KL, v_opt": [(low + high) / 2, low, high, 0.04]}
    words = report.in_words(pd.DataFrame(rows, ["value", "low", "high", "chance"]).T)
    assert said in words and "random directions, each at the best of 8 lengths, removes 4%" in words


def test_a_share_below_zero_is_one_that_is_added():
    rows = {"of KL, v*": [-0.27, -0.38, -0.18, -0.69]}
    said = report.in_words(pd.DataFrame(rows, ["value", "low", "high", "chance"]).T)
    assert "v* adds 27% [18%, 38%], and" in said and "random directions, each as strong as v*, adds 69%" in said


def test_tokens_are_ranked_by_what_v_star_adds_to_their_logits(trained):
    changes, chance = report.token_changes(trained)
    logits = (trained.lm.unembedding @ trained.direction()).numpy()
    names = [trained.lm.tokenizer.decode([i]) for i in (logits.argmin(), logits.argmax())]
    assert [changes.index[0], changes.index[-1]] == names and chance > 0
    np.testing.assert_allclose(changes.iloc[-1], (logits.max() - logits.mean()) / logits.std(ddof=1), rtol=1e-4)


def test_beginnings_of_unrelated_texts_move_as_plain_forward_passes_say(trained, plain):
    beginnings, shifts = report._beginnings(trained), []
    assert max(len(tokens.prompt) for tokens in beginnings) <= report.FIRST + 1
    for tokens in beginnings:
        with torch.no_grad():
            read = [model.get_decoder()(torch.tensor([tokens.ids]))[0][0, -1] for model in plain.values()]
        shifts.append(read[1] - read[0])
    shift, v = torch.stack(shifts).mean(0), trained.direction().double()
    found = report.elsewhere(trained).loc["final"]
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(shift, v, dim=0).item(), abs=1e-4)
    assert found["size"] == pytest.approx((shift.norm() / v.norm()).item(), rel=1e-3)
    assert 0 < found["chance"] < 1
    texts = [torch.stack(shifts[i : i + report.FIRST]).mean(0) for i in range(0, len(shifts), report.FIRST)]
    together = sum(text.square().sum() for text in texts).sqrt() / len(texts)
    assert found["size by chance"] == pytest.approx((together / v.norm()).item(), rel=1e-3)


def test_answers_stand_beside_each_other_at_each_dose(trained):
    found = report.answers(trained)
    assert len(found) == report.ASKED * len(report.DOSES)
    nothing = found[found["dose"] == 0]
    assert (nothing["base"] == nothing["base + λv*"]).all() and (nothing["DPO"] == nothing["DPO − λv*"]).all()
    some, prompts = trained.pairs["heldout"][: report.AMONG], trained.prompts("heldout")[: report.AMONG]
    alone, sizes = {}, trained.profile.sizes
    for column, role, dose in (("base", "base", 0), ("DPO", "dpo", 0), ("base + λv*", "base", 2)):
        with trained.lm.playing(role) as model:
            ids = decoding.sample(
                model, trained.lm.tokenizer, prompts, sizes.new_tokens, trained.profile.seed, "final",
                dose * trained.direction()[None], temperature=sizes.temperature,
            )[0]  # fmt: skip
        alone[column] = decoding.texts(trained.lm.tokenizer, ids)
    differ = [i for i in range(len(some)) if alone["base"][i] != alone["DPO"][i]]
    alike = [i for i in range(len(some)) if i not in differ]
    shown = (differ + alike)[: report.ASKED]
    assert found["prompt"].unique().tolist() == [some[i].prompt for i in shown]
    for column, texts in alone.items():
        assert found[found["dose"] == 2][column].tolist() == [texts[i] for i in shown]


# --- Prompts alone ---


def test_of_prompts_alone_both_models_read_the_partners_answers(pair):
    (chosen, rejected), prompts = pair.encoded("heldout"), pair.prompts("heldout")
    assert chosen == rejected and [tokens.prompt for tokens in chosen] == list(prompts)
    with pair.lm.playing("dpo") as model:
        sizes = pair.profile.sizes
        said = decoding.sample(model, pair.lm.tokenizer, prompts, sizes.new_tokens, 0, draws=sizes.draws)[0]
    assert [tokens.response[: len(ids)] for tokens, ids in zip(chosen, said)] == said
    assert pair.account["column 'comment' not read"] and not pair.task.has_judge


def test_a_page_needs_no_answers_and_no_judge(pair):
    kl = report.kl_by_token(pair)
    found = report.shares(pair, kl)
    assert [re.sub(r".*, ", "", name) for name in found.index if "KL" in name] == ["v*", "v_opt"]
    assert not any("behaviour" in name for name in found.index)
    assert "removes" in report.in_words(found) and len(report.elsewhere(pair)) == 3
    assert len(report.moved(pair)) == 4 and len(report.answers(pair)) == report.ASKED * len(report.DOSES)
    assert "ready one" in pair.caveat


def test_prompts_alone_train_nothing():
    with pytest.raises(
        ValueError, match="say nothing of what is preferred: give a ready partner of the model with DPO"
    ):
        profiles.load("tinystories", data="prompts:some.jsonl")


def test_a_prompt_alone_is_a_prompt(pair):
    asked = pair.pairs["heldout"][0]
    assert asked.chosen == asked.rejected == "" and Tokens(pair.prompts("heldout")[0]).response == []


def test_where_logits_are_more_than_products_it_is_told_of_whole_answers_and_without_v_opt(trained, kl, monkeypatch):
    monkeypatch.setattr(study.Study, "logits_are_products", False)
    found = report.kl_by_token(trained)
    summed = [table.groupby(["arm", "prompt"])["kl"].sum().unstack("prompt") for table in (found, kl)]
    assert set(found["token"]) == {0} and "v_opt" not in summed[0].index
    for arm in summed[0].index:
        np.testing.assert_allclose(summed[0].loc[arm], summed[1].loc[arm], rtol=1e-3, atol=1e-5)
    assert "v_opt" not in report.in_words(report.shares(trained, found))
