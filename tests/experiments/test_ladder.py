"""The ladder from one vector to the partner: every rung by plain forward passes, and its tables by hand."""

import copy
import json
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_vector
from studied import PROFILE, WIDTH, decoded, logits, logp, logps

from helpers import estimates, spectra, study
from helpers.experiments import ladder
from helpers.experiments.ladder import Measured
from helpers.experiments.rungs import (
    DOSES,
    IN_BLOCKS,
    Rung,
    best_dose,
    best_in_a_block,
    nearest_shifts,
    sides,
    trained_in_blocks,
)
from helpers.experiments.rungs import rungs as all_rungs
from helpers.lm import decoding, encoding, steering
from helpers.lm.architecture import causal_lm
from helpers.stages import tilted
from helpers.stages.beliefs import beliefs
from helpers.stages.shifts import LOW_RANKS, PROBE, PROMPT, STATE, TOKEN, of_kind
from helpers.stages.tilted import tilted_divergences
from helpers.study import Study

close = torch.testing.assert_close
ASKED = (0, 5)  # held-out prompts, of which plain forward passes tell
NOTHING = torch.zeros(1, WIDTH)


@pytest.fixture(scope="module")
def trained(trained):
    """The tiny study with held-in answers enough for several tokens of an answer to have vectors of their own."""
    return Study(PROFILE.replace(name="ladder", sizes=PROFILE.sizes.replace(heldin=40)))


@pytest.fixture(scope="module")
def rungs(trained):
    return {rung.name: rung for rung in all_rungs(trained)}


@pytest.fixture(scope="module")
def measured(trained):
    return ladder.measured(trained)


@pytest.fixture(scope="module")
def found(measured):
    return {name: one.columns for name, one in measured.items()}


@pytest.fixture(scope="module")
def shifts(trained):
    return nearest_shifts(trained)


NAMES = [
    "v*", "{dose} v*", "v_opt", "one a token of the answer", "two, by a probe of the prompt",
    "linear in the prompt's state", "head, rank 1", "head, rank 2", "head, rank 4", "head, full rank",
    "{of} v* at {site}", "trained at {site}", "trained at all block sites", "0.5 × adapter", "0.75 × adapter",
    "adapter, rank 1", "adapter, rank 2",
]  # fmt: skip
BY_VECTORS, BY_STATE, OF_BLOCKS = NAMES[:6], NAMES[6:10], NAMES[10:13]


def named(s, *names) -> list[str]:
    """Names with the doses and the site that were found best."""
    site, of = best_in_a_block(s)
    return [name.format(dose=f"{best_dose(s):g}", of=f"{of:g}", site=site) for name in names]


def adding(vector):
    """A hook that adds a vector to what a module puts out."""
    return lambda _, __, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector


def with_shift(model, shift):
    """A model with a head of its own: z(h) = b + M (h - mean) / scale."""
    M = shift.M.double() / shift.scale
    model.lm_head.register_forward_pre_hook(lambda _, given: (given[0] + shift.b + (given[0] - shift.mean) @ M.T,))
    return model


def with_vectors(model, vectors):
    parts = [model.model.embed_tokens, *model.model.layers]
    for site, vector in vectors.items():
        parts[int(site.removeprefix("resid[").removesuffix("]"))].register_forward_hook(adding(vector))
    return model


def adapted(model, s, change):
    """A base with what `change` makes of what the partner's adapter adds to each weight."""
    with s.lm.playing("dpo") as partner:
        for name, layer in causal_lm(partner).named_modules():
            if hasattr(layer, "get_delta_weight"):
                model.get_submodule(name).weight.data += change(layer.get_delta_weight("default").double())
    return model


def of_rank(weight, rank):
    """The best approximation of a rank."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :rank] * S[:rank] @ V[:rank]


@pytest.fixture
def model_of(trained, plain, shifts):
    """By a name of NAMES, a rung's model by plain weights and torch's own hooks, in float64, and what is added to the
    logits of the tokens of an answer to prompt i, (vocabulary,) or (length, vocabulary)."""
    base, v, (site, of) = plain["base"], trained.direction(), best_in_a_block(trained)
    tokens, n = of_kind(shifts, TOKEN), of_kind(shifts, TOKEN).M.shape[1]
    vectors = {
        "v*": lambda i, length: v,
        "{dose} v*": lambda i, length: best_dose(trained) * v,
        "v_opt": lambda i, length: trained.nearest_vector(),
        "one a token of the answer": lambda i, length: tokens(torch.eye(n)[torch.arange(length).clamp(max=n - 1)]),
        "two, by a probe of the prompt": lambda i, _: of_kind(shifts, PROBE)(sides(trained)["heldout"][i, None]),
        "linear in the prompt's state": lambda i, _: of_kind(shifts, PROMPT)(trained.final("base", "heldout")[i]),
    }
    ranks = dict(zip(BY_STATE, (*LOW_RANKS, 0)))
    in_blocks = {
        "{of} v* at {site}": lambda: {site: of * trained.direction(site)},
        "trained at {site}": lambda: trained_in_blocks(trained, [site]),
        "trained at all block sites": lambda: trained_in_blocks(trained, trained.lm.sites[:-1]),
    }

    def made(name, i, length=1):
        if name in vectors:
            return base, vectors[name](i, length).double() @ base.get_output_embeddings().weight.T
        model = copy.deepcopy(base)
        if name in ranks:
            return with_shift(model, of_kind(shifts, STATE, ranks[name])), 0.0
        if name in in_blocks:
            return with_vectors(model, in_blocks[name]()), 0.0
        if name.endswith("× adapter"):
            return adapted(model, trained, lambda weight: float(name.split()[0]) * weight), 0.0
        return adapted(model, trained, lambda weight: of_rank(weight, int(name.split()[-1]))), 0.0

    return made


# --- What the rungs are ---


def test_rungs_are_in_the_order_of_what_they_may_do(trained, rungs):
    assert list(rungs) == named(trained, *NAMES)
    kinds = ["one vector", "by position", "by prompt", "by state", "in the blocks", "adapter"]
    assert list(dict.fromkeys(rung.kind for rung in rungs.values())) == kinds
    assert rungs["one a token of the answer"].deltas.shape[2] > 1


@pytest.mark.parametrize("name", NAMES)
def test_kl_of_every_rung_is_that_of_plain_forward_passes(trained, plain, found, model_of, name):
    answered = trained.answered("dpo", trained.prompts("heldout"))
    for i in ASKED:
        model, shift = model_of(name, i, len(answered[i].response))
        with torch.no_grad():
            p, q = logps(plain["dpo"], answered[i]), logps(model, answered[i], shift)
        expected = (p.exp() * (p - q)).sum().item()
        assert (
            found[named(trained, name)[0]]["kl"][i] == pytest.approx(expected, rel=1e-3, abs=1e-5) and expected > 1e-4
        )


def test_doses_are_those_that_come_nearest_on_validation_prompts(trained, plain):
    """At final and in the blocks, by plain forward passes."""
    answered, v = trained.answered("dpo", trained.prompts("validation")), trained.direction().double()
    W, goal = plain["base"].get_output_embeddings().weight, [logps(plain["dpo"], tokens) for tokens in answered]

    def kl(shift):
        each = [logps(plain["base"], tokens, shift) for tokens in answered]
        return sum((p.exp() * (p - q)).sum().item() for p, q in zip(goal, each))

    left = {dose: kl(dose * v @ W.T) for dose in DOSES}
    assert best_dose(trained) == min(left, key=left.get)
    left = {}
    for site, block in zip(("resid[1]", "resid[2]"), plain["base"].model.layers):
        for dose in IN_BLOCKS:
            with ExitStack() as stack:
                stack.callback(block.register_forward_hook(adding(dose * trained.direction(site))).remove)
                left[site, dose] = kl(0.0)
    assert best_in_a_block(trained) == min(left, key=left.get)


def test_a_rung_that_may_do_more_leaves_no_more_where_it_was_found(trained, shifts):
    """On the partner's answers to held-in prompts: v*, a dose of it, v_opt, and a vector a token."""
    answered, v, tokens = (
        trained.answered("dpo", trained.prompts("heldin")),
        trained.direction(),
        of_kind(shifts, TOKEN),
    )
    by_token = tokens(torch.eye(tokens.M.shape[1]))[None, None]
    arms = [0 * v[None], v[None], best_dose(trained) * v[None], trained.nearest_vector()[None], by_token]
    base, dpo = trained.lm.role("base"), trained.lm.role("dpo")
    kl = tilted_divergences(base, dpo, answered, ladder._together(arms, len(answered)))
    left = kl.groupby("arm")["kl"].sum()
    assert left[4] < left[3] < min(left[1], left[2]) <= max(left[1], left[2]) < left[0]


def test_parameters_are_the_numbers_that_each_is_free_in(trained, rungs, measured):
    d, tokens = WIDTH, rungs["one a token of the answer"].deltas.shape[2]
    with trained.lm.playing("dpo") as model:
        layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
        sizes = sum(sum(layer.get_delta_weight("default").shape) for layer in layers)
    expected = {
        "v*": d, "{dose} v*": d + 1, "v_opt": d, "one a token of the answer": tokens * d,
        "two, by a probe of the prompt": 3 * d + 1,  # and the probe's threshold
        "head, rank 1": d + 2 * d - 1, "head, rank 4": d + 4 * (2 * d - 4), "head, full rank": d + d * d,
        "{of} v* at {site}": d, "trained at {site}": d, "trained at all block sites": 3 * d,
        "linear in the prompt's state": d + d * d,
        "0.5 × adapter": 1, "adapter, rank 1": sizes, "adapter, rank 2": 2 * sizes,
    }  # fmt: skip
    assert {name: rungs[named(trained, name)[0]].parameters for name in expected} == expected
    assert measured["partner"].rung.parameters == PROFILE.recipe.rank * sizes


# --- Where they stand ---


@pytest.fixture(scope="module")
def table(trained, measured):
    return ladder.table(trained, measured)


def test_the_partner_removes_all_and_the_base_nothing(trained, table):
    assert table.loc["base", "KL"][:3] == (0, 0, 0)
    assert table.loc["partner", "KL"][:3] == pytest.approx((1, 1, 1), abs=1e-9)
    assert table.index.tolist() == ["base", *named(trained, *NAMES), "partner"]
    assert table.loc["base", "lead"][:3] == (0, 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_what_was_measured_as_shares_of_the_way(trained, table, found, name):
    row, its, base = table.loc[named(trained, name)[0]], found[named(trained, name)[0]], found["base"]
    assert row["KL"].value == pytest.approx(1 - its["kl"].sum() / base["kl"].sum())
    assert row["KL"].low <= row["KL"].value <= row["KL"].high
    assert row["lead"].value == pytest.approx((its["lead"] - base["lead"]).mean())
    assert row["fluency"] == pytest.approx(its["well_formed"].mean())
    assert np.isnan(row["behaviour"].value)  # of which the tiny partner shows none


def test_behaviour_is_the_share_of_the_way_from_base_to_partner(trained):
    n = trained.factors("heldout").shape[1]
    some = {"kl": np.ones(n), "well_formed": np.ones(n)}
    preferred = {"base": 0.25, "half": 0.5, "partner": 0.75}
    rung = Rung("half", "a kind", None, NOTHING, 7)
    made = {name: Measured(rung, some | {"preferred": np.full(n, value)}, 1.0) for name, value in preferred.items()}
    row = ladder._row(trained, made["half"], made["base"], made["partner"])
    assert row["behaviour"].value == pytest.approx(0.5) and "lead" not in row
    assert (row["kind"], row["parameters"]) == ("a kind", 7)


def test_ends_are_measured_as_any_study_measures_them(trained, found):
    for end, role in (("base", "base"), ("partner", "dpo")):
        table = trained.answers(role, "heldout")
        assert list(found[end]["text"]) == table["text"].tolist()
        np.testing.assert_allclose(found[end]["lead"], trained.lead(role), atol=1e-5)
    np.testing.assert_allclose(found["base"]["kl"], trained.strength()[0], rtol=1e-5)
    np.testing.assert_allclose(found["v*"]["kl"], trained.strength()[1], rtol=1e-5)
    np.testing.assert_allclose(found["partner"]["kl"], 0, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "v*",
        "two, by a probe of the prompt",
        "linear in the prompt's state",
        "head, full rank",
        "trained at all block sites",
    ],
)
def test_answers_are_sampled_from_the_rung_s_own_model(trained, found, model_of, name):
    prompts = trained.prompts("heldout")
    for i in ASKED:
        model, shift = model_of(name, i)
        ids = decoded(model, prompts[i], i, shift)
        assert list(found[name]["ids"][i]) == ids
    assert len({tuple(map(tuple, found[one]["ids"])) for one in ("base", name)}) == 2


def test_answers_by_token_are_moved_by_each_token_s_own_vector(trained, plain, found, model_of):
    length = PROFILE.sizes.new_tokens
    for i in ASKED:
        shift = model_of("one a token of the answer", i, length)[1]
        noise, ids, prompt = (
            decoding.GumbelNoise([i], PROFILE.seed, PROFILE.sizes.draws),
            [],
            trained.prompts("heldout")[i],
        )
        while len(ids) < length:
            scores = (logits(plain["base"], prompt + ids)[-1] + shift[len(ids)]).float()
            ids.append(noise.added(scores[None], torch.tensor([i]))[0].argmax().item())
            if ids[-1] == trained.lm.tokenizer.eos_token_id:
                ids.pop()
                break
        assert list(found["one a token of the answer"]["ids"][i]) == ids


@pytest.mark.parametrize(
    "name",
    [
        "one a token of the answer",
        "two, by a probe of the prompt",
        "linear in the prompt's state",
        "head, rank 2",
        "adapter, rank 1",
    ],
)
def test_leads_are_of_values_stated_to_the_very_prompt_that_a_shift_is_of(trained, found, model_of, name):
    """Of every fourth held-out prompt: here the second of those, each of whose values is an answer of its own."""
    pair, scores = trained.pairs["heldout"][4], []
    for stated in trained.task.stated(pair):
        tokens = encoding.encode(trained.lm.tokenizer, pair.prompt, stated)
        model, shift = model_of(name, 4, len(tokens.response))
        with torch.no_grad():
            scores.append(logp(model, tokens, shift))
    assert len(found[name]["lead"]) == 2
    assert found[name]["lead"][1] == pytest.approx(scores[0] - max(scores[1:]), abs=2e-3)


def test_facts_that_are_asked_apart_are_asked_under_what_is_added_everywhere(trained, rungs, found, monkeypatch):
    """Here the same facts in other words, which no held-out prompt has."""
    asked = [replace(pair, prompt=f"So: {pair.prompt}") for pair in trained.task.facts_asked(trained.pairs["heldout"])]
    monkeypatch.setattr(type(trained.task), "facts_asked", lambda *_: [one for one in asked for _ in range(4)])
    monkeypatch.setattr(type(trained.task), "has_facts", False)
    everywhere, by_prompt = rungs["v*"], rungs["linear in the prompt's state"]
    some = [by_prompt, everywhere, rungs["v_opt"]]
    leads = ladder._leads(trained, some)
    assert set(leads["arm"]) == {1, 2} and len(leads) == 2 * len(asked)
    alone = beliefs(everywhere.role, trained.task, asked, everywhere.deltas)
    np.testing.assert_allclose(leads.loc[leads["arm"] == 1, "lead"], alone["lead"], atol=1e-5)
    told = ladder._together_measured(trained, some)
    assert "lead" not in told[by_prompt.name].columns and len(told["v*"].columns["lead"]) == len(asked)
    np.testing.assert_allclose(told[by_prompt.name].columns["kl"], found[by_prompt.name]["kl"], rtol=1e-9)


def test_deltas_of_several_rungs_stay_what_each_adds():
    """Of fewer tokens the last one's is that of all that follow."""
    v, own, by_token, fewer = (random_vector(*shape) for shape in ((1, 5), (2, 3, 5), (1, 1, 4, 5), (1, 3, 2, 5)))
    assert torch.equal(ladder._together([v, 2 * v], 3), torch.cat([v, 2 * v]))
    found = ladder._together([v, own, by_token, fewer], 3)
    assert found.shape == (5, 3, 4, 5)
    for i in range(3):
        for t in range(4):
            expected = torch.stack([v[0], own[0, i], own[1, i], by_token[0, 0, t], fewer[0, i, min(t, 1)]])
            assert torch.equal(found[:, i, t], expected)


# --- Sides of prompts ---


def toy(between: float):
    """States whose first coordinate tells the side, and displacements that differ along a line by side."""
    made = SimpleNamespace(truth={})
    line, common = random_vector(8, seed=1).double(), 5 * random_vector(8, seed=2).double()
    states, moved = {}, {}
    for k, (split, n) in enumerate((("heldin", 60), ("validation", 20), ("heldout", 30))):
        side = torch.where(random_vector(n, seed=k) > 0, 1.0, -1.0)
        states[split] = 0.3 * random_vector(n, 6, seed=10 + k)
        states[split][:, 0] += 2 * side
        moved[split] = common + between * side[:, None] * line + 0.1 * random_vector(n, 8, seed=20 + k)
        made.truth[split] = side.double()
    made.final = lambda role, split: {"base": states}[role][split]
    made.displacements = lambda split: {"heldin": moved["heldin"]}[split]  # the partner is needed there alone
    return made


def test_sides_follow_from_the_states_where_displacements_differ_by_them():
    s = toy(between=1.0)
    found = sides(s)
    way = found["heldin"][0] * s.truth["heldin"][0]  # which side is 1 is anyone's choice
    for split, side in s.truth.items():
        assert torch.equal(way * found[split], side)


def test_sides_are_ones_and_minus_ones_whatever_the_prompts(trained):
    found = sides(trained)
    for split in ("heldin", "validation", "heldout"):
        assert found[split].shape == (len(trained.prompts(split)),)
        assert set(found[split].tolist()) <= {1.0, -1.0}
    moved = trained.displacements("heldin").double()
    along = (moved - moved.mean(0)) @ torch.linalg.svd(moved - moved.mean(0), full_matrices=False).Vh[0]
    agreed = ((along > 0) == (found["heldin"] > 0)).double().mean().item()
    assert max(agreed, 1 - agreed) > 0.8


# --- Where in an answer ---


@pytest.fixture(scope="module")
def tokens(trained):
    return ladder.by_token(trained)


def test_by_token_rungs_add_up_to_what_is_measured_of_answers(trained, tokens, found, rungs):
    summed = tokens.groupby(["arm", "prompt"])["kl"].sum()
    at_final = named(trained, *BY_VECTORS)
    assert set(tokens["arm"]) == {"nothing", *at_final, *(f"own, {k}" for k in spectra.ranks(WIDTH))}
    for name in at_final:
        np.testing.assert_allclose(summed[name], found[name]["kl"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(summed["nothing"], found["base"]["kl"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, WIDTH])
def test_a_prompt_s_own_displacement_is_cut_to_held_in_directions(trained, plain, tokens, k):
    V = torch.linalg.svd(trained.displacements("heldin").double(), full_matrices=False).Vh[:k]
    W, answered = plain["base"].get_output_embeddings().weight, trained.answered("dpo", trained.prompts("heldout"))
    for i in ASKED:
        z = trained.displacements("heldout")[i].double() @ V.T @ V
        p, q = logps(plain["dpo"], answered[i]), logps(plain["base"], answered[i], z @ W.T)
        some = tokens[(tokens["arm"] == f"own, {k}") & (tokens["prompt"] == i)].sort_values("token")
        assert some["kl"].tolist() == pytest.approx((p.exp() * (p - q)).sum(1).tolist(), rel=1e-3, abs=2e-5)
        if k == WIDTH:  # at the prompt's last token it takes the base to the partner
            assert some["kl"].iloc[0] < 1e-6


def test_shares_by_rank_and_token_are_those_of_means_over_tokens():
    rows = [("nothing", 0, t, 4.0) for t in range(10)] + [("nothing", 1, t, 2.0) for t in range(3)]
    rows += [("own, 1", 0, t, float(t)) for t in range(10)] + [("own, 1", 1, t, 1.0) for t in range(3)]
    rows += [("own, 4", i, t, 0.0) for i, n in ((0, 10), (1, 3)) for t in range(n)] + [("v*", 0, 0, 9.0)]
    found = ladder.rank_by_token(pd.DataFrame(rows, columns=["arm", "prompt", "token", "kl"]))
    assert found.index.tolist() == ["own, 1", "own, 4"]
    assert found.columns.tolist() == ["1", "2", "3, 4", "5 to 8", "9 on"]
    # the first token: means 0.5 of 3; the second 1 of 3; the third and fourth (2 + 3 + 1) / 3 of (4 + 4 + 2) / 3
    expected = [1 - 0.5 / 3, 1 - 1 / 3, 1 - 6 / 10, 1 - 5.5 / 4, 1 - 8.5 / 4]
    np.testing.assert_allclose(found.loc["own, 1"], expected)
    np.testing.assert_array_equal(found.loc["own, 4"], 1)


def test_of_short_answers_later_tokens_are_not_told():
    rows = [(arm, 0, t, kl) for arm, kl in (("nothing", 2.0), ("own, 1", 1.0)) for t in range(2)]
    found = ladder.rank_by_token(pd.DataFrame(rows, columns=["arm", "prompt", "token", "kl"]))
    assert found.columns.tolist() == ["1", "2"] and (found == 0.5).all(axis=None)


# --- Differences, and the ceiling ---


def test_a_gain_is_a_paired_difference_of_shares_and_a_cost_one_of_leads(trained, measured, found):
    gain = ladder.gain(trained, measured, "v_opt", "v*")
    left = [found[name]["kl"].mean() for name in ("v*", "v_opt", "base")]
    assert gain.value == pytest.approx((left[0] - left[1]) / left[2]) and gain.low < gain.value < gain.high
    cost = ladder.cost(trained, measured, "v_opt")
    assert cost.value == pytest.approx(np.mean(found["partner"]["lead"] - found["v_opt"]["lead"]))


def test_no_constant_vector_removes_more_than_that_which_is_found_on_what_it_is_told_of(trained, table):
    at_most, dose = ladder.at_most(trained).value, named(trained, "{dose} v*")[0]
    assert all(table["KL"][name].value <= at_most + 1e-4 for name in ("v*", dose, "v_opt"))
    rng = torch.Generator().manual_seed(1)
    near = trained.nearest_vector() + 0.02 * torch.randn(20, WIDTH, generator=rng)
    kl = trained.divergences("base", near).groupby("arm")["kl"].mean() / trained.strength()[0].mean()
    assert (1 - kl).max() <= at_most + 1e-4


def test_where_one_search_holds_no_more_the_bound_is_of_as_many_prompts_as_it_does(trained, monkeypatch):
    answered = trained.answered("dpo", trained.prompts("heldout"))
    some = sum(len(one.response) for one in answered[:6])
    monkeypatch.setattr(ladder, "MOST_LOGITS", (some + 1) * len(trained.lm.unembedding))
    monkeypatch.setattr(tilted, "MOST_LOGITS", ladder.MOST_LOGITS)
    at_most = ladder.at_most(trained).value
    v = tilted.nearest_vector(*map(trained.lm.role, ("base", "dpo")), answered[:6], some, trained.profile.seed)[
        "vector"
    ]
    kl = trained.divergences("base", torch.stack([0 * v, v, trained.nearest_vector()]))
    whole, own, other = (kl[(kl["arm"] == arm) & (kl["prompt"] < 6)]["kl"].mean() for arm in range(3))
    assert at_most == pytest.approx(1 - own / whole, abs=1e-5) and own < other


def test_a_cosine_as_it_is_heard_is_one_of_changes_of_logits_under_the_base(trained, plain):
    """Over the tokens of validation answers, by the covariance of two changes of the logits under the base."""
    v, others = trained.nearest_vector().double(), {"v*": trained.direction(), "twice": 2 * trained.nearest_vector()}
    W = plain["base"].get_output_embeddings().weight.double()
    found, answered = ladder.cosines_as_heard(trained, others), trained.answered("dpo", trained.prompts("validation"))
    p = torch.cat([logps(plain["base"], tokens) for tokens in answered]).double().exp()

    def covariance(a, b):
        a, b = W @ a, W @ b.double()
        return ((p * a * b).sum(1) - (p * a).sum(1) * (p * b).sum(1)).sum()

    w = others["v*"].double()
    heard = covariance(v, w) / (covariance(v, v) * covariance(w, w)).sqrt()
    assert found.loc["v*", "cosine"] == pytest.approx(heard.item(), abs=1e-4)
    assert found.loc["twice", ["cosine", "plain cosine", "norm"]].tolist() == pytest.approx([1, 1, 0.5])


# --- Other partners ---


def test_a_whole_model_has_no_rungs_of_an_adapter(trained):
    whole = Study(PROFILE.replace(name="whole", recipe=PROFILE.recipe.replace(rank=0, learning_rate=1e-3)))
    found = ladder.table(whole, ladder.measured(whole))
    assert not found.index.str.contains("adapter").any() and "trained at all block sites" in found.index
    assert found.loc["partner", "KL"][:3] == pytest.approx((1, 1, 1), abs=1e-9) and found.loc["v*", "KL"].value > 0


def test_where_logits_are_more_than_products_there_are_no_shifts_at_final(trained, monkeypatch, found):
    def more(model, delta):
        raise steering.NoBias("The logits are more than W h.")

    monkeypatch.setattr(steering, "bias_on_logits", more)
    every = all_rungs(trained)
    assert [rung.name for rung in every] == named(trained, *NAMES[:2], *OF_BLOCKS, *NAMES[13:])
    some = ladder.measured(trained)
    for rung in every:
        np.testing.assert_allclose(some[rung.name].columns["kl"], found[rung.name]["kl"], rtol=1e-4, atol=1e-6)
    with pytest.raises(steering.NoBias, match="more than W h"):
        ladder.by_token(trained)


def test_of_prompts_alone_there_is_a_ladder_without_behaviour_and_leads(trained, tmp_path):
    path = tmp_path / "prompts.jsonl"
    asked = dict.fromkeys(pair.prompt for split in trained.pairs.values() for pair in split)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    ready = {"model": str(trained.source.path), "dpo_model": str(trained.chosen.adapter.path)}
    sizes = PROFILE.sizes.replace(heldin=8, validation=4, heldout=8)
    s = study.OfPrompts(PROFILE.replace(name="asked", data=f"prompts:{path}", sizes=sizes, **ready))
    found = ladder.table(s, ladder.measured(s))
    assert "lead" not in found and all(np.isnan(row.value) for row in found["behaviour"])
    assert found.loc["partner", "KL"].value == pytest.approx(1, abs=1e-9) and found.loc["base", "KL"].value == 0
    text = s.answers("base", "heldout")
    assert found.loc["base", "fluency"] == pytest.approx(text["token_loss"].mean())
    assert isinstance(found.loc["v_opt", "KL"], estimates.Estimate)
