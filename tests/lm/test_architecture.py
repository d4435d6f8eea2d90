"""Where every architecture keeps its parts."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, CONTEXT, LAYERS, VOCABULARY, WIDTH, random_ids, recorded, tiny, with_adapter

from helpers.lm import architecture


def test_parts_are_found_in_every_architecture_and_through_peft(model_type, model):
    wrapped = with_adapter(model)
    for found in (model, wrapped):
        own = found.get_base_model() if found is wrapped else model
        assert architecture.causal_lm(found) is own
        assert list(architecture.blocks(found)) == list(own.get_submodule(ARCHITECTURES[model_type][1]))
        assert architecture.sites(found) == ["resid[0]", "resid[1]", "resid[2]", "resid[3]", "final"]
        assert architecture.unembedding(found).weight.shape == (VOCABULARY, WIDTH)
    assert architecture.signature(model) == architecture.signature(wrapped)
    assert architecture.signature(model)["layers"] == LAYERS and architecture.signature(model)["width"] == WIDTH


def test_the_decoder_is_what_a_forward_pass_calls_and_final_is_what_the_unembedding_reads(model_type):
    model, calls = copy.deepcopy(tiny(model_type)).double(), []
    architecture.decoder(model).register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([random_ids(5, 1)])
    logits = model(ids).logits
    assert calls == [1]
    h = architecture.decoder(model)(input_ids=ids).last_hidden_state
    bias = getattr(architecture.unembedding(model), "bias", None)
    expected = h @ architecture.unembedding(model).weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)


def test_the_signature_follows_the_unembedding_and_not_the_adapter_or_the_dtype(llama):
    changed = copy.deepcopy(llama)
    changed.lm_head.weight[0, 0] += 1
    assert architecture.signature(changed)["unembedding"] != architecture.signature(llama)["unembedding"]
    assert architecture.signature(copy.deepcopy(llama))["unembedding"] == architecture.signature(llama)["unembedding"]


def test_the_final_norm_takes_the_last_residual_stream_to_final(model_type, model):
    norm = architecture.final_norm(model)
    with torch.no_grad(), recorded(model, ARCHITECTURES[model_type][1]) as states:
        model(torch.tensor([random_ids(5, 1)]))
        found = norm(states[f"resid[{LAYERS}]"])
    assert torch.equal(found, states["final"])
    assert architecture.final_norm(with_adapter(model)).weight.shape == (WIDTH,)


def test_a_model_without_a_final_norm_is_refused():
    model = copy.deepcopy(tiny("llama"))
    model.model.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no final norm"):
        architecture.final_norm(model)


def test_blocks_that_cannot_be_found_are_refused(llama):
    broken = copy.deepcopy(llama)
    broken.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"No list of 7 blocks in LlamaForCausalLM.*not supported"):
        architecture.blocks(broken)


@pytest.mark.parametrize("site, layer", [("resid[0]", 0), ("resid[2]", 2), ("resid[3]", 3), ("final", None)])
def test_site_layer(llama, site, layer):
    assert architecture.site_layer(llama, site) == layer


@pytest.mark.parametrize(
    "site", ["resid[4]", "resid[-1]", "resid[]", "resid[1", "resid1", "Final", "", " final", "resid[1]x"]
)
def test_unknown_sites_are_refused_with_the_known_ones(llama, site):
    with pytest.raises(ValueError, match=r"Unknown site .*resid\[0\] to resid\[3\] and final") as caught:
        architecture.site_layer(llama, site)
    assert repr(site) in str(caught.value)


def test_context_length(llama):
    assert architecture.context_length(llama) == architecture.context_length(tiny("gpt2")) == CONTEXT
    assert architecture.context_length(tiny("bloom")) is None
    architecture.check_sequences(tiny("bloom"), [[1] * 10_000])
    architecture.check_sequences(llama, [[1], [1] * (CONTEXT - 3)], 3)
    with pytest.raises(
        ValueError, match="Prompt 1 needs 65 tokens and the model's context holds 64: shorten it or drop it"
    ):
        architecture.check_sequences(llama, [[1], [1] * (CONTEXT - 2)], 3)


def test_a_token_without_an_embedding_is_refused_by_its_number(llama):
    architecture.check_sequences(llama, [[VOCABULARY - 1]])
    with pytest.raises(ValueError, match="Prompt 1 holds the token 61, and the model has 61 embeddings"):
        architecture.check_sequences(llama, [[1], [2, VOCABULARY]])


@pytest.mark.parametrize("medium, fits", [(7, False), (8, True)])
def test_two_larger_models_are_trained_beside_each_other_up_to_a_number_of_parameters(monkeypatch, medium, fits):
    monkeypatch.setattr(architecture, "SMALL", 7)
    monkeypatch.setattr(architecture, "MEDIUM", medium)
    model = torch.nn.Linear(3, 2)
    model.device = torch.device("cpu")
    assert architecture.fits_beside_another(model) is fits
    model.device = torch.device("meta")
    assert not architecture.fits_beside_another(model)


@pytest.mark.parametrize("at_most, small", [(8, True), (7, False)])
def test_a_model_is_small_up_to_a_number_of_parameters(monkeypatch, at_most, small):
    monkeypatch.setattr(architecture, "SMALL", at_most)
    assert architecture.is_small(torch.nn.Linear(3, 2)) is small  # 3 x 2 weights and 2 biases
