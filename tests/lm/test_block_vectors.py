"""Vectors in the blocks: where they are added, their KL and its gradients, and one that is found again."""

import copy

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, WIDTH, hook_count, random_ids, random_vector, recorded, tiny

from helpers.lm import architecture, batches, block_vectors, likelihoods
from helpers.lm.batches import Tokens
from helpers.lm.block_vectors import Towards

close = torch.testing.assert_close
IDS = torch.tensor([random_ids(12, 1), random_ids(12, 2)])
VECTORS = {f"resid[{l}]": 0.3 * random_vector(WIDTH, seed=l) for l in (0, 1, 3)}
ANSWERED = [Tokens(random_ids(p, p), random_ids(r, 50 + p)) for p, r in [(4, 6), (9, 3), (2, 8), (7, 5), (5, 1)]]
OTHERS = [Tokens(random_ids(p, 100 + p), random_ids(r, 150 + p)) for p, r in [(6, 7), (3, 4), (8, 6)]]


@torch.no_grad()
def states(model, path):
    with recorded(model, path) as found:
        model(input_ids=IDS, use_cache=False)
    return found


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def towards(model, answered, vectors=None) -> Towards:
    """A goal: a model with vectors added."""
    with block_vectors.added(model, vectors or {}):
        return Towards(answered, likelihoods.response_distributions(model, answered))


# --- Where they are added ---


def test_a_vector_is_added_at_every_position_of_its_site_and_nothing_before_it_changes(model_type, model):
    path = ARCHITECTURES[model_type][1]
    before, sites = states(model, path), architecture.sites(model)
    for i, site in enumerate(sites[:-1]):
        v = random_vector(WIDTH, seed=i)
        with block_vectors.added(model, {site: v}):
            after = states(model, path)
        assert torch.equal(after[site], before[site] + v)
        assert all(torch.equal(after[earlier], before[earlier]) for earlier in sites[:i])
        assert all((after[later] - before[later]).abs().max() > 1e-3 for later in sites[i + 1 :])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_together_they_are_biases_of_the_embedding_and_of_down_projections(model_type):
    """Of which Llama has none, and is given one; GPT-2's embedding is its unembedding too, so its positions' moves."""
    model = tiny(model_type)
    biased = copy.deepcopy(model)
    embedding = biased.get_input_embeddings() if model_type == "llama" else biased.transformer.wpe
    embedding.weight += VECTORS["resid[0]"]
    for site, block in (("resid[1]", 0), ("resid[3]", 2)):
        mlp = biased.get_submodule(ARCHITECTURES[model_type][1])[block].mlp
        down = mlp.down_proj if model_type == "llama" else mlp.c_proj
        own = 0 if down.bias is None else down.bias
        down.bias = torch.nn.Parameter(own + VECTORS[site], requires_grad=False)
    with block_vectors.added(model, VECTORS):
        close(logits(model), logits(biased), atol=1e-4, rtol=1e-4)
    assert (logits(model) - logits(biased)).abs().max() > 0.1


def test_nothing_is_left_afterwards_even_after_an_exception(model):
    plain, before = logits(model), hook_count(model)
    with pytest.raises(KeyError), block_vectors.added(model, VECTORS):
        assert hook_count(model) == before + len(VECTORS) and not torch.equal(logits(model), plain)
        raise KeyError("something else")
    with (
        pytest.raises(ValueError, match=r"Unknown site 'resid\[9\]'"),
        block_vectors.added(model, VECTORS | {"resid[9]": VECTORS["resid[0]"]}),
    ):
        pytest.fail("it was added")
    assert hook_count(model) == before and torch.equal(logits(model), plain)


# --- KL and gradients ---


def test_kl_is_that_of_likelihoods_a_token(model):
    goal = towards(model, ANSWERED, {"resid[2]": random_vector(WIDTH, seed=8)})
    found = block_vectors.kl_and_gradients(model, goal, VECTORS)[0]
    with block_vectors.added(model, VECTORS):
        expected = likelihoods.kl_to(goal.distributions, model, ANSWERED).sum()
    assert found == pytest.approx(expected / sum(len(s.response) for s in ANSWERED), rel=1e-4) and found > 1e-3


def test_gradients_are_finite_differences(model_type):
    """Along a random line at each site, of the KL by another function in float64."""
    model = copy.deepcopy(tiny(model_type)).double()
    goal = towards(model, ANSWERED, {"resid[2]": random_vector(WIDTH, seed=8)})
    gradients = block_vectors.kl_and_gradients(model, goal, VECTORS)[1]
    tokens = sum(len(s.response) for s in ANSWERED)
    for i, (site, v) in enumerate(VECTORS.items()):
        line, ends = 3e-3 * random_vector(WIDTH, seed=20 + i).double(), []
        for way in (1, -1):
            with block_vectors.added(model, VECTORS | {site: v + way * line}):
                ends.append(likelihoods.kl_to(goal.distributions, model, ANSWERED).sum() / tokens)
        rounding = 1e-3 * (gradients[i].norm() * line.norm()).item()
        assert (gradients[i].double() @ line).item() == pytest.approx((ends[0] - ends[1]) / 2, abs=rounding)


def test_they_do_not_depend_on_batches(llama, monkeypatch):
    goal = towards(llama, ANSWERED, VECTORS)
    nothing = {site: torch.zeros(WIDTH) for site in VECTORS}
    value, gradients = block_vectors.kl_and_gradients(llama, goal, nothing)
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)
    alone = block_vectors.kl_and_gradients(llama, goal, nothing)
    assert alone[0] == pytest.approx(value, rel=1e-5)
    close(alone[1], gradients, atol=1e-5, rtol=1e-4)


def test_at_the_goal_kl_and_gradients_are_nothing_and_no_graph_is_left(llama):
    given = {site: v.clone() for site, v in VECTORS.items()}
    value, gradients = block_vectors.kl_and_gradients(llama, towards(llama, ANSWERED, given), given)
    assert value == pytest.approx(0, abs=1e-6) and max(g.abs().max() for g in gradients) < 1e-5
    assert not any(v.requires_grad for v in (*given.values(), *gradients))


def test_a_token_that_the_goal_never_says_does_no_harm(llama):
    goal = towards(llama, ANSWERED, VECTORS)
    never = [logps.index_fill(1, torch.tensor([3, 4]), -torch.inf).log_softmax(-1) for logps in goal.distributions]
    value, gradients = block_vectors.kl_and_gradients(llama, Towards(ANSWERED, never), VECTORS)
    assert np.isfinite(value) and all(g.isfinite().all() for g in gradients)


# --- The nearest ---


def scales(model, sites) -> dict[str, float]:
    found = states(model, "model.layers")
    return {site: found[site].square().mean().sqrt().item() for site in sites}


@pytest.fixture
def known(llama):
    """Vectors that were really added, and the goal that they make, on answers and on others."""
    vectors = {"resid[1]": random_vector(WIDTH, seed=5), "resid[2]": -random_vector(WIDTH, seed=6)}
    return vectors, towards(llama, ANSWERED, vectors), towards(llama, OTHERS, vectors)


@pytest.mark.parametrize("sites", [["resid[1]"], ["resid[2]"], ["resid[1]", "resid[2]"]])
def test_vectors_that_were_added_are_found(llama, known, sites):
    """Where one site alone is given, the goal is what the one vector makes."""
    vectors = {site: known[0][site] for site in sites}
    goals = [towards(llama, some, vectors) for some in (ANSWERED, OTHERS)]
    found = block_vectors.nearest_vectors(llama, *goals, scales(llama, sites))
    assert list(found) == sites and all(v.shape == (WIDTH,) and v.dtype == torch.float32 for v in found.values())
    for goal in goals:  # of which one is held out
        before = likelihoods.kl_to(goal.distributions, llama, goal.answered).sum()
        with block_vectors.added(llama, found):
            assert likelihoods.kl_to(goal.distributions, llama, goal.answered).sum() < 0.01 * before


def test_more_rounds_come_nearer_on_the_others_too(llama, known):
    _, goal, others = known
    left = []
    for rounds in (0, 1, 2):
        found = block_vectors.nearest_vectors(llama, goal, others, scales(llama, known[0]), rounds)
        with block_vectors.added(llama, found):
            left.append([likelihoods.kl_to(some.distributions, llama, some.answered).mean() for some in (goal, others)])
    assert (np.diff(left, axis=0) < 0).all()


def test_no_rounds_give_zeros_and_so_does_a_goal_that_others_would_leave(llama, known):
    vectors, goal, others = known
    for found in (
        block_vectors.nearest_vectors(llama, goal, others, scales(llama, vectors), rounds=0),
        block_vectors.nearest_vectors(llama, goal, towards(llama, OTHERS), scales(llama, vectors)),
    ):
        assert list(found) == list(vectors) and not any(v.any() for v in found.values())


def test_the_scales_are_only_what_vectors_are_sought_in(llama, known):
    """Sites whose states are taken for smaller or larger than they are end where the others do."""
    vectors, goal, others = known
    before = likelihoods.kl_to(others.distributions, llama, others.answered).sum()
    for by in (0.5, 2.0):
        own = {site: by * scale for site, scale in scales(llama, vectors).items()}
        with block_vectors.added(llama, block_vectors.nearest_vectors(llama, goal, others, own)):
            assert likelihoods.kl_to(others.distributions, llama, others.answered).sum() < 0.02 * before
