"""The nearest linear shifts by stage: in which contexts, by which penalty, and one that was really made is found."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import random_ids, random_vector, recorded, tiny
from studied import WIDTH, logits

from helpers.lm import linear_shifts, steering
from helpers.lm.batches import Tokens
from helpers.lm.linear_shifts import LinearShift
from helpers.stages import shifts as stage
from helpers.stages.interventions import with_shift
from helpers.stages.roles import Role
from helpers.stages.shifts import LOW_RANKS, PROBE, PROMPT, STATE, TOKEN, of_kind, one_hot, shifts
from helpers.stages.tilted import nearest_vector, tilted_divergences

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def given(trained):
    """The partner's answers to held-in and to validation prompts, and a side for each."""
    answered = [trained.answered("dpo", trained.prompts(split)) for split in ("heldin", "validation")]
    return *answered, tuple(torch.tensor([1.0, -1.0]).repeat(len(some))[: len(some)] for some in answered)


@pytest.fixture(scope="module")
def roles(trained):
    return trained.lm.role("base"), trained.lm.role("dpo")


def test_contexts_are_those_that_plain_forward_passes_read(trained, plain, roles, given):
    W = trained.lm.unembedding
    found = stage._contexts(*roles, W, given[0], given[2][0], 0)
    states, prompts, expected, tokens, sides = [], [], [], [], []
    for tokens_of, side in zip(given[0], given[2][0].tolist()):
        n, length = len(tokens_of.prompt), len(tokens_of.response)
        with recorded(plain["base"], "model.layers") as read:
            logits(plain["base"], tokens_of.ids)
        states.append(read["final"][0, n - 1 : -1])
        prompts.append(read["final"][0, n - 1].expand(length, -1))
        expected.append(logits(plain["dpo"], tokens_of.ids)[n - 1 : -1].softmax(-1) @ W.double())
        tokens.append(torch.arange(length))
        sides.append(torch.full((length,), side))
    for part, by_hand in zip(found, (states, prompts, expected, tokens, sides), strict=True):
        close(part.double(), torch.cat(by_hand).double(), atol=1e-4, rtol=1e-4)


def test_of_more_contexts_some_are_drawn_by_the_seed(trained, roles, given, monkeypatch):
    whole = stage._contexts(*roles, trained.lm.unembedding, given[0], given[2][0], 0)
    monkeypatch.setattr(stage, "CONTEXTS", 20)
    drawn = [stage._contexts(*roles, trained.lm.unembedding, given[0], given[2][0], seed) for seed in (0, 0, 1)]
    rows = [[(whole.states == h).all(1).nonzero()[0].item() for h in some.states] for some in drawn]
    assert rows[0] == rows[1] == sorted(set(rows[0])) != rows[2] and len(rows[0]) == 20
    close(drawn[2].expected, whole.expected[rows[2]])
    assert torch.equal(drawn[2].tokens, whole.tokens[rows[2]]) and torch.equal(drawn[2].sides, whole.sides[rows[2]])


def test_of_a_large_vocabulary_fewer_contexts_are_drawn(trained, roles, given, monkeypatch):
    monkeypatch.setattr(stage, "MOST_LOGITS", 7 * len(trained.lm.unembedding) + 1)
    assert len(stage._contexts(*roles, trained.lm.unembedding, given[0], given[2][0], 0).states) == 7


def test_what_a_shift_may_depend_on_are_the_features_of_its_kind():
    contexts = stage.Contexts(
        *(random_vector(3, 2, seed=seed) for seed in range(3)), torch.tensor([0, 1, 5]), torch.ones(3)
    )
    close(contexts.features(TOKEN, 3), torch.eye(3))
    close(contexts.features(PROBE, 3), torch.ones(3, 1))
    assert contexts.features(PROMPT, 3) is contexts.prompts and contexts.features(STATE, 3) is contexts.states
    assert one_hot(torch.tensor([0, 3, 9]), 4).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


# --- The nearest ---


def left(roles, answered, shift, features) -> float:
    """KL(partner || base + shift), nats a token, each prompt and token with a delta of its own. features: of an
    answer's tokens, by prompt."""
    longest = max(len(tokens.response) for tokens in answered)
    deltas = torch.stack([shift(x)[[min(t, len(x) - 1) for t in range(longest)]] for x in features])
    return tilted_divergences(*roles, answered, deltas[None].float())["kl"].mean()


def features_of(trained, kind, answered, sides, tokens):
    """x(c) of each answer's tokens, by prompt."""
    read = trained.read("base", [Tokens(one.prompt) for one in answered], "final")
    by_token = [one_hot(torch.arange(len(one.response)), tokens) for one in answered]
    by_prompt = {PROBE: sides[:, None, None], PROMPT: read[:, None]}
    return by_token if kind == TOKEN else [x.expand(len(t), -1) for x, t in zip(by_prompt[kind], by_token)]


@pytest.mark.parametrize("kind", [TOKEN, PROBE, PROMPT])
def test_each_kind_leaves_no_more_than_the_nearest_constant_vector(trained, roles, given, monkeypatch, kind):
    monkeypatch.setattr(stage, "FEWEST", 1 / 20)
    heldin, _, (sides, _) = given
    found = of_kind(shifts.__wrapped__(*roles, *given, 0), kind)  # not kept: no key knows of the patch
    x = features_of(trained, kind, heldin, sides, found.M.shape[1])
    v = nearest_vector(*roles, heldin, 10_000, 0)["vector"]
    nothing = LinearShift(v, torch.zeros_like(found.M), found.mean, 1.0)
    if kind == TOKEN:
        counts = torch.bincount(torch.cat([torch.arange(len(one.response)) for one in heldin]))
        assert found.M.shape[1] == (counts >= counts.sum() / 20).sum() > 1
    assert left(roles, heldin, found, x) < left(roles, heldin, nothing, x) - 1e-5


def test_tokens_have_vectors_of_their_own_up_to_the_first_rare_one(monkeypatch):
    monkeypatch.setattr(stage, "FEWEST", 1 / 4)
    for tokens, own in (([0, 0, 0, 1, 2, 2, 2], 1), ([0, 0, 1, 1, 2, 2], 3), ([1, 1, 1], 1), ([0, 0, 0, 0], 1)):
        assert stage._of_their_own(torch.tensor(tokens)) == own


def test_a_probe_s_two_vectors_are_nearly_those_of_each_side_alone(trained, roles, given):
    """But for the penalty on what they differ in."""
    heldin, _, (sides, _) = given
    found, alone, both = of_kind(shifts(*roles, *given, 0), PROBE), 0.0, 0.0
    for side in (1.0, -1.0):
        some = [tokens for tokens, its in zip(heldin, sides) if its == side]
        deltas = torch.stack([nearest_vector(*roles, some, 10_000, 0)["vector"], found(torch.tensor([side]))])
        of_best, of_found = tilted_divergences(*roles, some, deltas).groupby("arm")["kl"].sum()
        alone, both = alone + of_best, both + of_found
    assert 0.9999 * alone <= both < 1.02 * alone


def test_a_change_of_the_head_that_was_made_is_found_at_its_rank(trained, roles, given):
    base, heldin, validation = roles[0], *given[:2]
    scale = trained.final("base", "heldin").square().mean().sqrt().item()
    b, M = (
        0.5 * random_vector(WIDTH, seed=1),
        torch.outer(random_vector(WIDTH, seed=2), random_vector(WIDTH, seed=3)) / 6,
    )
    made = with_shift(base, LinearShift(b, M, torch.zeros(WIDTH), scale))
    found = shifts(base, made, *given, 0)
    nothing = torch.zeros(1, WIDTH)
    for answered, least in ((heldin, 0.999), (validation, 0.99)):
        before = tilted_divergences(base, made, answered, nothing)["kl"].sum()
        for rank in (*LOW_RANKS, 0):
            after = tilted_divergences(with_shift(base, of_kind(found, STATE, rank)), made, answered, nothing)[
                "kl"
            ].sum()
            assert 1 - after / before > least
    ranks = [int(torch.linalg.matrix_rank(of_kind(found, STATE, rank).M, rtol=1e-4)) for rank in (1, 4)]
    assert ranks[0] == 1 and ranks[1] <= 4


@pytest.mark.parametrize("penalties", [(1e-2, 1e-4, 1e-6), (1e-6, 1e-2)])
def test_the_penalty_is_the_one_that_serves_other_contexts_best(monkeypatch, penalties):
    """Each by itself, from no shift; noise is what too small a penalty fits."""
    monkeypatch.setattr(stage, "PENALTIES", penalties)
    W = random_vector(30, 6, seed=1).double()

    def contexts(n, seed):
        h, noise = random_vector(n, 6, seed=seed).double(), random_vector(n, 30, seed=seed + 1).double()
        expected = (h @ W.T + 0.2 * h[:, :1] * W[:, 0] + 2 * noise).softmax(-1) @ W
        return stage.Contexts(h, h, expected, torch.zeros(n, dtype=int), torch.ones(n))

    fit, check = contexts(40, 2), contexts(300, 5)
    shift, penalty = stage._best(stage._Head(W, None), fit, check, STATE, 1)
    losses = [linear_shifts.kl_loss(W, c.states, c.expected) for c in (fit, check)]
    tried = {by: linear_shifts.nearest(losses[0], fit.states, 6, by, steps=1000) for by in penalties}
    served = {by: losses[1](one(check.states))[0] for by, one in tried.items()}
    assert penalty == min(served, key=served.get) == 1e-2 and max(served.values()) > served[1e-2] + 1e-3
    close(shift(check.states), tried[penalty](check.states), atol=1e-3, rtol=1e-3)


def test_where_the_context_says_nothing_a_shift_is_one_constant_vector():
    """Beside a goal that is one vector off and noise, every M is noise: the likeliest penalty leaves none of it."""
    W, v = random_vector(30, 6, seed=1).double(), random_vector(6, seed=2).double()

    def contexts(n, seed):
        h, noise = random_vector(n, 6, seed=seed).double(), random_vector(n, 30, seed=seed + 1).double()
        expected = ((h + v) @ W.T + 2 * noise).softmax(-1) @ W
        return stage.Contexts(random_vector(n, 6, seed=seed + 2).double(), h, expected, torch.zeros(n, dtype=int), h)

    fit, check = contexts(40, 3), contexts(300, 7)
    shift, penalty = stage._best(stage._Head(W, None), fit, check, STATE, 1)
    assert penalty >= 0.1
    loss = linear_shifts.kl_loss(W, fit.states, fit.expected)
    alone = linear_shifts.nearest(loss, fit.states, 6, float("inf"), steps=1000)
    assert alone.M.shape == (6, 6) and not alone.M.any()
    _, gradients = loss(alone(fit.states))
    close(gradients.mean(0), torch.zeros(6).double(), atol=1e-4, rtol=0)  # the best constant vector
    of_both = [linear_shifts.kl_loss(W, check.states, check.expected)(one(check.states))[0] for one in (shift, alone)]
    assert of_both[0] <= of_both[1] + 1e-6


# --- Heads that are more than W ---


def of_model(name, model) -> Role:
    return Role(name, f"a tiny {name}", lambda: nullcontext(model), lambda: None)


SOME = [Tokens(random_ids(5, seed), random_ids(6, seed + 100)) for seed in range(5)]


def test_a_bias_of_the_unembedding_is_part_of_the_distributions(trained, monkeypatch):
    """Of Phi, against the vector that tilts of its own distributions give; the partner has another bias."""
    base = tiny("phi")
    other = copy.deepcopy(base)
    other.lm_head.bias += 2 * random_vector(len(base.lm_head.bias), seed=1)
    other.lm_head.weight += 0.1 * random_vector(*base.lm_head.weight.shape, seed=2)
    roles = of_model("phi", base), of_model("other phi", other)
    monkeypatch.setattr(stage, "FEWEST", 1)  # one vector for all tokens
    found = of_kind(shifts.__wrapped__(*roles, SOME, SOME, (torch.ones(5), torch.ones(5)), 0), TOKEN)
    v = nearest_vector(*roles, SOME, 1000, 0)["vector"]
    kl = tilted_divergences(*roles, SOME, torch.stack([v, found(torch.ones(1)), 0 * v])).groupby("arm")["kl"].mean()
    # sixty steps of a search end short of the optimum, on some processors by half a thousandth
    assert kl[0] == pytest.approx(kl[1], rel=2e-3) and kl[0] < 0.9 * kl[2] and found.M.shape[1] == 1


def test_where_the_base_s_logits_are_more_than_products_it_is_refused_and_the_goal_s_may_be(trained):
    capped = copy.deepcopy(tiny("llama"))
    capped.lm_head.register_forward_hook(lambda _, __, out: 2 * torch.tanh(out))
    base, goal = of_model("llama", tiny("llama")), of_model("capped", capped)
    sides = (torch.ones(5), torch.ones(5))
    with pytest.raises(steering.NoBias, match="more than W h"):
        shifts(goal, base, SOME, SOME, sides, 0)
    z, nothing = of_kind(shifts(base, goal, SOME, SOME, sides, 0), TOKEN)(torch.eye(1)), torch.zeros(1, WIDTH)
    kl = tilted_divergences(base, goal, SOME, torch.cat([nothing, z])).groupby("arm")["kl"].sum()
    assert kl[1] < 0.95 * kl[0]
