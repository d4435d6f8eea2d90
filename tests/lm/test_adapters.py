"""A scaled adapter: the base at 0, the partner at 1, and in between the one whose B was multiplied."""

import copy

import pytest
import torch
from conftest import hook_count, random_ids, tiny, with_adapter
from peft import IA3Config, LoraConfig, get_peft_model

from helpers.lm import adapters

IDS = torch.tensor([random_ids(9, 1), random_ids(9, 2)])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def scaling(model):
    return [dict(m.scaling) for m in model.modules() if isinstance(m, adapters.LoraLayer)]


@pytest.fixture(params=["llama", "gpt2"])
def base(request):
    return tiny(request.param)


@pytest.fixture
def partner(base):
    return with_adapter(base)


def test_scaled_by_0_it_is_the_base_and_by_1_the_partner_bit_for_bit(base, partner):
    whole = logits(partner)
    with adapters.scaled(partner, 0):
        assert torch.equal(logits(partner), logits(base))
    with adapters.scaled(partner, 1):
        assert torch.equal(logits(partner), whole)
    assert not torch.equal(whole, logits(base)) and torch.equal(logits(partner), whole)


@pytest.mark.parametrize("scale", [0.5, 2.0, -1.5])
def test_it_is_the_adapter_whose_b_was_multiplied(partner, scale):
    by_hand = copy.deepcopy(partner)
    for name, parameter in by_hand.named_parameters():
        if "lora_B" in name:
            parameter.data *= scale
    with adapters.scaled(partner, scale):
        torch.testing.assert_close(logits(partner), logits(by_hand), atol=1e-5, rtol=1e-4)


def test_its_scaling_is_restored_after_an_exception(partner):
    before, whole = scaling(partner), logits(partner)
    with pytest.raises(KeyError), adapters.scaled(partner, 0.25):
        assert scaling(partner) == [{"default": layer["default"] / 4} for layer in before]
        raise KeyError("something else")
    assert scaling(partner) == before and torch.equal(logits(partner), whole) and not hook_count(partner)


def test_the_base_of_a_scaled_adapter_is_the_base(base, partner):
    with adapters.scaled(partner, 3.0), partner.disable_adapter():
        assert torch.equal(logits(partner), logits(base))


@pytest.mark.parametrize(
    "config, said",
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "a variant of LoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
        (LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "bias"),
        (LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]), "trainable_token_indices"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3 and no LoRA"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_would_stay_when_it_is_scaled_is_refused_in_a_sentence(llama, config, said):
    model = get_peft_model(copy.deepcopy(llama), config)
    with (
        pytest.raises(adapters.NoPlainAdapter, match=f"The partner's adapter .*{said}.*\\.$"),
        adapters.scaled(model, 0.5),
    ):
        pytest.fail("it was scaled")


def test_a_whole_model_is_refused_in_a_sentence(llama):
    with pytest.raises(adapters.NoPlainAdapter, match="is a whole model and no adapter"):
        adapters.check(llama)
