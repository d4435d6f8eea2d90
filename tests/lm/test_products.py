"""Faster products are as exact, of large models alone, and nothing of them is left afterwards."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.lm import architecture, products


def _settings():
    return torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def counted_as_large(monkeypatch):
    monkeypatch.setattr(architecture, "SMALL", 0)


def test_inside_products_of_a_large_model_are_exact(model, counted_as_large):
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    with products.fast(model):
        assert products.rounding(a, b) < products.ROUNDING


def test_rounding_tells_bfloat16_from_float32():
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    exact = a.double() @ b.double()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    of_bfloat16 = ((rounded - exact).norm() / exact.norm()).item()
    assert products.rounding(a, b) < products.ROUNDING < of_bfloat16 / 100


def test_logits_and_gradients_are_those_of_plain_products(model, counted_as_large):
    ids, mask = torch.randint(64, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0  # padded on the left, so that some tokens look at none

    def computed():
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits[mask == 1].square().mean().backward()
        return logits[mask == 1].detach(), [p.grad.clone() for p in model.parameters()]

    plain, plain_gradients = computed()
    with products.fast(model):
        logits, gradients = computed()
    torch.testing.assert_close(logits, plain)
    torch.testing.assert_close(gradients, plain_gradients)


def test_settings_are_changed_inside_alone_and_where_something_is_raised(model, counted_as_large):
    before = _settings()
    with pytest.raises(KeyError), products.fast(model):
        inside = _settings()
        raise KeyError
    assert inside == (("medium" if products._is_exact() else "highest"), not products._is_exact())
    assert _settings() == before == ("highest", True)


def test_where_products_are_rounded_nothing_changes(model, counted_as_large, monkeypatch):
    monkeypatch.setattr(products, "_is_exact", lambda: False)
    with products.fast(model):
        assert _settings() == ("highest", True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_alone(model, counted_as_large, dtype):
    with products.fast(model.to(dtype)):
        assert _settings() == ("highest", True)


def test_small_models_are_left_alone(model):
    with products.fast(model):
        assert _settings() == ("highest", True)
