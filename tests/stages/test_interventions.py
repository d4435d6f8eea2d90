"""Changed models as roles: stages keep each change by itself, and work on it as on any model."""

import pytest
import torch
from conftest import random_vector, recorded
from studied import PROFILE, WIDTH, logits, logp, logps

from helpers.lm import likelihoods
from helpers.lm.adapters import NoPlainAdapter
from helpers.lm.architecture import causal_lm
from helpers.lm.linear_shifts import LinearShift
from helpers.stages.divergences import divergences
from helpers.stages.interventions import cut, scaled, with_shift, with_vectors
from helpers.stages.keys import digests
from helpers.stages.log_ratios import log_ratios
from helpers.stages.sampled import sampled
from helpers.study import Study

NOTHING = torch.zeros(1, WIDTH)


@pytest.fixture
def adapted(trained, plain):
    """The base with what `change` makes of what the adapter adds to each of its weights."""

    def with_changes(change):
        base = plain["base"]
        with trained.lm.playing("dpo") as model:
            for name, layer in causal_lm(model).named_modules():
                if hasattr(layer, "get_delta_weight"):
                    base.get_submodule(name).weight.data += change(layer.get_delta_weight("default").double())
        return base

    return with_changes


@pytest.fixture
def halfway(adapted):
    """The base with half of what the adapter adds to each of its weights."""
    return adapted(lambda weight: 0.5 * weight)


def test_a_scale_is_part_of_what_decides_a_role(trained):
    dpo = trained.lm.role("dpo")
    roles = (dpo, scaled(dpo, 0.5), scaled(dpo, 0.25), scaled(dpo, 1.0))
    assert len({digests({"role": role})["role"] for role in roles}) == 4
    assert scaled(dpo, 0.5).key == scaled(dpo, 0.5).key


def test_stages_take_it_as_any_model_and_leave_the_partner_as_it_was(trained, halfway):
    before = trained.log_ratios("dpo", NOTHING)["margin"]
    answers = trained.encoded("heldout")
    found = log_ratios(scaled(trained.lm.role("dpo"), 0.5), *answers, NOTHING)["margin"]
    expected = [logp(halfway, chosen) - logp(halfway, rejected) for chosen, rejected in zip(*answers)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4) and abs(before - found).max() > 1e-3
    again = log_ratios(trained.lm.role("dpo"), *answers, NOTHING.double())  # another key, the same model
    assert again["margin"].tolist() == before.tolist()


def test_at_1_it_answers_as_the_partner_and_at_0_its_kl_to_the_base_is_0(trained):
    base, dpo, sizes = trained.lm.role("base"), trained.lm.role("dpo"), trained.profile.sizes
    asked = trained.prompts("heldout"), sizes.new_tokens, 0, sizes.draws
    assert sampled(scaled(dpo, 1.0), *asked) == sampled(dpo, *asked)
    answered = trained.answered("base", trained.prompts("heldout"))
    kl = [divergences(base, scaled(dpo, by), answered, NOTHING)["kl"].mean() for by in (0.0, 0.5, 1.0)]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[0] < kl[1] < kl[2]


# --- Other changes ---


def shift(seed=0, scale=2.0) -> LinearShift:
    """A change of the head that depends on the state."""
    M = 0.3 * random_vector(WIDTH, WIDTH, seed=seed)
    return LinearShift(random_vector(WIDTH, seed=seed + 1), M, random_vector(WIDTH, seed=seed + 2), scale)


def distributions(role, answered):
    with role.opened() as model:
        return likelihoods.response_distributions(model, answered)


def test_every_change_is_part_of_what_decides_a_role(trained):
    """Which one it is, by how much, and of which model."""
    base, dpo, v = trained.lm.role("base"), trained.lm.role("dpo"), torch.ones(WIDTH)
    one, both = {"resid[1]": v}, {"resid[1]": v, "resid[2]": v}
    roles = [base, dpo, cut(dpo, 1), cut(dpo, 2), scaled(dpo, 1), scaled(dpo, 2), with_vectors(dpo, one)]
    roles += [with_vectors(base, vectors) for vectors in (one, {"resid[2]": v}, {"resid[1]": 2 * v}, both)]
    roles += [with_shift(base, shift()), with_shift(base, shift(1)), with_shift(base, shift(scale=3.0))]
    roles += [with_shift(dpo, shift()), with_shift(with_vectors(base, one), shift())]
    assert len({digests({"role": role})["role"] for role in roles}) == len(roles)
    assert with_vectors(base, one).key == with_vectors(base, {"resid[1]": v.clone()}).key
    assert with_shift(base, shift()).key == with_shift(base, shift()).key and cut(dpo, 1).key == cut(dpo, 1).key
    assert all(role.tokenizer() is trained.lm.tokenizer for role in roles)


def test_with_a_shift_logits_are_those_of_a_state_moved_by_what_it_is(trained, plain):
    answered, base, z = trained.encoded("heldout")[0], trained.lm.role("base"), shift()
    found = distributions(with_shift(base, z), answered)
    W = plain["base"].get_output_embeddings().weight
    for i in (0, 3):
        with recorded(plain["base"], "model.layers") as states:
            logits(plain["base"], answered[i].ids)
        h = states["final"][0, len(answered[i].prompt) - 1 : -1]
        moved = h + z.b + ((h - z.mean) / z.scale) @ z.M.double().T
        torch.testing.assert_close(found[i].double(), (moved @ W.T).log_softmax(-1), atol=1e-4, rtol=1e-4)
    before = distributions(base, answered)
    assert all((one - other).abs().max() > 0.1 for one, other in zip(found, before))


def test_a_shift_that_is_a_vector_says_what_the_vector_does(trained):
    """Answers, and KL beside a further delta."""
    base, dpo, v = trained.lm.role("base"), trained.lm.role("dpo"), 2 * trained.direction()
    constant = with_shift(base, LinearShift(v, torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH), 1.0))
    prompts, sizes = trained.prompts("heldout"), trained.profile.sizes
    asked = prompts, sizes.new_tokens, 0, sizes.draws
    assert sampled(constant, *asked).said == sampled(base, *asked, "final", v[None]).said
    answered = trained.answered("dpo", prompts)
    kl = [divergences(base, dpo, answered, torch.stack([v, 1.5 * v])), divergences(constant, dpo, answered, NOTHING)]
    kl.append(divergences(constant, dpo, answered, 0.5 * v[None]))
    assert kl[1]["kl"].tolist() == pytest.approx(kl[0]["kl"][: len(answered)].tolist(), abs=1e-5)
    assert kl[2]["kl"].tolist() == pytest.approx(kl[0]["kl"][len(answered) :].tolist(), abs=1e-5)


def test_with_vectors_it_is_the_model_whose_embeddings_and_down_projections_have_biases(trained, plain):
    answered, base = trained.encoded("heldout")[0], trained.lm.role("base")
    vectors = {"resid[0]": 0.2 * random_vector(WIDTH, seed=4), "resid[2]": random_vector(WIDTH, seed=5)}
    found = distributions(with_vectors(base, vectors), answered)
    biased = plain["base"]

    def moved(_, __, embedded):
        return embedded + vectors["resid[0]"]

    biased.get_input_embeddings().register_forward_hook(moved)
    biased.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(vectors["resid[2]"].double())
    for i in (0, 3):
        torch.testing.assert_close(found[i].double(), logps(biased, answered[i]).detach(), atol=1e-4, rtol=1e-4)


def test_a_cut_partner_is_the_base_with_the_best_approximation_of_each_change(trained, adapted):
    def best(weight):
        U, S, V = torch.linalg.svd(weight)
        return S[0] * torch.outer(U[:, 0], V[0])

    before = trained.log_ratios("dpo", NOTHING)["margin"]
    answers, rank_one = trained.encoded("heldout"), adapted(best)
    found = log_ratios(cut(trained.lm.role("dpo"), 1), *answers, NOTHING)["margin"]
    expected = [logp(rank_one, chosen) - logp(rank_one, rejected) for chosen, rejected in zip(*answers)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4) and abs(before - found).max() > 1e-3
    again = log_ratios(trained.lm.role("dpo"), *answers, NOTHING.double())  # another key, the same model
    assert again["margin"].tolist() == before.tolist()


@pytest.mark.parametrize("change", [lambda role: cut(role, 1), lambda role: scaled(role, 0.5)])
def test_a_model_without_an_adapter_is_refused_when_it_is_opened(trained, change):
    whole = Study(PROFILE.replace(name="whole", recipe=PROFILE.recipe.replace(rank=0, learning_rate=1e-3)))
    changed = change(whole.lm.role("dpo"))
    with pytest.raises(NoPlainAdapter, match="whole model and no adapter"), changed.opened():
        pytest.fail("it was opened")
