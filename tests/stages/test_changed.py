"""Changed models as roles: stages keep each change by itself, and work on it as on any model."""

import pytest
import torch
from studied import WIDTH, logp

from helpers.lm.architecture import causal_lm
from helpers.stages.changed import scaled
from helpers.stages.divergences import divergences
from helpers.stages.keys import digests
from helpers.stages.log_ratios import log_ratios
from helpers.stages.sampled import sampled

NOTHING = torch.zeros(1, WIDTH)


@pytest.fixture
def halfway(trained, plain):
    """The base with half of what the adapter adds to each of its weights."""
    base = plain["base"]
    with trained.lm.playing("dpo") as model:
        for name, layer in causal_lm(model).named_modules():
            if hasattr(layer, "get_delta_weight"):
                base.get_submodule(name).weight.data += 0.5 * layer.get_delta_weight("default").double()
    return base


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
