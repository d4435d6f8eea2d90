"""A scaled adapter: the base at 0, the partner at 1, and in between the one whose B was multiplied; and one cut to a
rank: its weights by a whole singular value decomposition."""

import copy

import pytest
import torch
from conftest import WIDTH, hook_count, random_ids, tiny, with_adapter
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
    before, whole, hooks = scaling(partner), logits(partner), hook_count(partner)
    with pytest.raises(KeyError), adapters.scaled(partner, 0.25):
        assert scaling(partner) == [{"default": layer["default"] / 4} for layer in before]
        raise KeyError("something else")
    assert scaling(partner) == before and torch.equal(logits(partner), whole)
    assert hook_count(partner) == hooks  # transformers leaves some of its own where it was asked for hidden states


def test_the_base_of_a_scaled_adapter_is_the_base(base, partner):
    with adapters.scaled(partner, 3.0), partner.disable_adapter():
        assert torch.equal(logits(partner), logits(base))


@pytest.mark.parametrize(
    "config, said",
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "a variant of LoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
        (LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "bias"),
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "bias"),
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
    with pytest.raises(adapters.NoPlainAdapter, match="is a whole model and no adapter"), adapters.cut(llama, 1):
        pytest.fail("it was cut")
    assert not adapters.is_plain(llama)


# --- Cut to a rank ---


def of_rank(base, r, targets="all-linear", **others):
    """A copy of a model with an adapter of a rank that changes it."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=r, target_modules=targets, lora_alpha=3, init_lora_weights=False, task_type="CAUSAL_LM", **others
    )
    return get_peft_model(copy.deepcopy(base), config).eval()


def changes(model) -> list[torch.Tensor]:
    """What an adapter adds to each weight, by PEFT."""
    layers = [module for module in model.modules() if isinstance(module, adapters.LoraLayer)]
    return [layer.get_delta_weight("default").clone() for layer in layers]


def best(weight, rank):
    """The best approximation of a rank (Eckart and Young)."""
    U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank] @ V[:rank]).float()


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "r, rank, others",
    [
        (4, 0, {}),
        (4, 1, {}),
        (4, 3, {}),
        (20, 5, {}),  # more than a key's weight is wide
        (40, 5, {}),  # or any
        (4, 2, {"rank_pattern": {".*mlp.*": 6}, "use_rslora": True}),
    ],
)
def test_each_weight_is_changed_by_the_best_approximation_of_its_change(base, r, rank, others):
    partner = of_rank(base, r, **others)
    whole, before = changes(partner), bits(partner)
    with adapters.cut(partner, rank):
        for found, change in zip(changes(partner), whole, strict=True):
            torch.testing.assert_close(found, best(change, rank), atol=1e-5, rtol=1e-4)
    assert max((change - best(change, rank)).abs().max() for change in whole) > 1e-2
    assert all(torch.equal(parameter, before[name]) for name, parameter in partner.named_parameters())


def test_a_cut_adapter_on_an_embedding_is_cut_too(llama):
    partner = of_rank(llama, 4, ["embed_tokens", "q_proj"])
    whole = changes(partner)
    with adapters.cut(partner, 2):
        for found, change in zip(changes(partner), whole, strict=True):
            torch.testing.assert_close(found, best(change, 2), atol=1e-5, rtol=1e-4)
    assert adapters.parameters(partner, 2) == 2 * (len(llama.model.embed_tokens.weight) + WIDTH + 3 * 2 * WIDTH)


@pytest.mark.parametrize("rank", [4, 5, 100])
def test_cut_to_as_much_as_it_has_it_stays_but_for_rounding(base, rank):
    partner = of_rank(base, 4)
    whole = logits(partner)
    with adapters.cut(partner, rank):
        torch.testing.assert_close(logits(partner), whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(partner), whole)


def test_cut_to_nothing_it_is_the_base_and_the_base_of_a_cut_adapter_too(base):
    partner = of_rank(base, 4)
    with adapters.cut(partner, 0):
        assert torch.equal(logits(partner), logits(base))
    with adapters.cut(partner, 1), partner.disable_adapter():
        assert torch.equal(logits(partner), logits(base))


def test_it_is_restored_bit_for_bit_after_an_exception(base):
    partner = of_rank(base, 4)
    before, whole, takes = bits(partner), logits(partner), [p.requires_grad for p in partner.parameters()]
    with pytest.raises(KeyError), adapters.cut(partner, 2):
        assert torch.is_grad_enabled() and not torch.equal(logits(partner), whole)
        raise KeyError("something else")
    assert torch.is_grad_enabled() and [p.requires_grad for p in partner.parameters()] == takes
    assert all(torch.equal(parameter, before[name]) for name, parameter in partner.named_parameters())


def test_it_is_restored_where_it_cannot_be_cut(llama, monkeypatch):
    partner, cut, calls = of_rank(llama, 4), adapters._cut, []
    before = bits(partner)

    def fails(*given):
        calls.append(given)
        if len(calls) == 3:
            raise torch.linalg.LinAlgError("it did not converge")
        return cut(*given)

    monkeypatch.setattr(adapters, "_cut", fails)
    with pytest.raises(torch.linalg.LinAlgError), adapters.cut(partner, 2):
        pytest.fail("it was cut")
    assert all(torch.equal(parameter, before[name]) for name, parameter in partner.named_parameters())


def test_parameters_are_those_that_are_trained(base):
    partner = of_rank(base, 4)
    trained = sum(parameter.numel() for parameter in partner.parameters() if parameter.requires_grad)
    assert adapters.parameters(partner) == trained > 0 and adapters.is_plain(partner)
    for rank in (1, 2, 4):
        assert adapters.parameters(partner, rank) == adapters.parameters(of_rank(base, rank)) == rank * trained // 4
    assert adapters.parameters(partner, 9) == trained  # cut to more than it has, it has no more


def test_an_adapter_that_holds_more_is_not_plain(llama):
    more = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not adapters.is_plain(get_peft_model(copy.deepcopy(llama), more))
