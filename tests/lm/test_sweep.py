"""Every causal language model of transformers that we know to work, tiny and with random weights: its parts, states,
log-probabilities, greedy answers, steering, and the first loss of its training.

What is found is held against forward passes and `generate` of transformers alone.
"""

import math
import tempfile
from functools import cache
from inspect import get_annotations, signature

import pandas as pd
import pytest
import torch
from conftest import random_ids
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers import gradients
from helpers.lm import activations, architecture, decoding, likelihoods, loading, training
from helpers.lm.batches import Tokens
from helpers.lm.recipe import Recipe
from helpers.lm.steering import SteeringVector

VOCABULARY = 61
SIZES = {  # under each of the names that configurations have for them
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "head_dim": 8, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TYPES = (
    "apertus", "arcee", "biogpt", "bitnet", "bloom", "cohere", "cohere2", "cwm", "diffllama", "doge", "ernie4_5",
    "ernie4_5_moe", "exaone4", "falcon", "falcon_h1", "flex_olmo", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gemma4", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite",
    "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "jamba", "llama", "minicpm3", "ministral",
    "mistral", "mixtral", "mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm", "starcoder2",
    "vaultgemma", "xglm",
)  # fmt: skip
OWN = {name: {"logits_scaling": 4.0} for name in ("granite", "granitemoe", "granitemoeshared")} | {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},  # of a few layers, one has to be attention
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "lm_head_multiplier": 0.5},
    "minicpm3": {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
                 "num_key_value_heads": 4, "dim_model_base": 16},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16,
                    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                    "num_kv_shared_layers": 1},
}  # fmt: skip
PARTS = {  # whose configuration is one in parts: that of its text, and small ones of what it sees by
    "gemma3": ("gemma3_text", {"vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
               "num_attention_heads": 2, "image_size": 8, "patch_size": 4}, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", {}),
}  # fmt: skip
VARIANTS = {  # as OPT-350m: without a final norm, and with another width at `final` than in the blocks
    "opt-350m": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False})
}
NO_DROPOUT = {"diffllama"}  # it has two softmaxes, which share no mask, and is not made with a rate above 0
# Whose logits are more than W h.
NOT_PLAIN = {
    "cohere", "cohere2", "falcon_h1", "gemma2", "granite", "granitemoe", "granitemoeshared", "minicpm3", "nanochat",
    "vaultgemma",
}  # fmt: skip
SEQUENCES = [Tokens(random_ids(n, n), random_ids(m, 9 + m)) for n, m in ((4, 3), (6, 2), (2, 4))]
PROMPTS = [tokens.prompt for tokens in SEQUENCES]


def configured(model_type: str):
    """A tiny configuration, with every rate of dropout at 0.3, which training has to take out; MPT's attention takes a
    whole number alone."""
    model_type, own = VARIANTS.get(model_type, (model_type, OWN.get(model_type, {})))
    if model_type in PARTS:
        text, others = PARTS[model_type]
        return AutoConfig.for_model(model_type, text_config=configured(text).to_dict(), **others)
    kind = type(AutoConfig.for_model(model_type))
    known = {*signature(kind.__init__).parameters} | {name for one in kind.__mro__ for name in get_annotations(one)}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = AutoConfig.for_model(model_type, **sizes | own)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float) and model_type not in NO_DROPOUT:
            setattr(config, name, 0.3)
    return config


def save(model_type: str, folder):
    """A model with its tokenizer, as a reader's own comes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configured(model_type))
    for parameter in model.parameters():  # the default is so small that every model is nearly the same
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.save_pretrained(folder)
    words().save_pretrained(folder)


@cache
def drawn(model_type: str):
    with tempfile.TemporaryDirectory() as folder:
        save(model_type, folder)
        return loading.load(folder)[0]


@pytest.fixture(params=[*TYPES, *VARIANTS])
def model_type(request):
    return request.param


@pytest.fixture
def model(model_type):
    return drawn(model_type)


@cache
def words():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


@pytest.fixture
def tokenizer():
    return words()


@torch.no_grad()
def passed(model, tokens: Tokens):
    """A forward pass of one sequence, alone and without padding."""
    return model(input_ids=torch.tensor([tokens.ids]), output_hidden_states=True, use_cache=False)


def test_states_are_those_of_a_plain_forward_pass_and_final_is_what_the_unembedding_reads(model, model_type):
    sites = architecture.sites(model)
    assert len(sites) == 5
    found = activations.hidden_states(model, SEQUENCES, sites)
    for i, tokens in enumerate(SEQUENCES):
        plain, at = passed(model, tokens), len(tokens.prompt) - 1
        for layer, states in enumerate(plain.hidden_states[:-1]):  # the last one is normed
            expected = states[0, at]
            torch.testing.assert_close(found[f"resid[{layer}]", "prompt_last"][i], expected, atol=2e-4, rtol=2e-4)
        read = architecture.unembedding(model)(found["final", "prompt_last"][i])
        is_plain = torch.allclose(read, plain.logits[0, at], atol=1e-3, rtol=1e-3)
        assert is_plain == (model_type not in NOT_PLAIN)


def test_the_final_norm_is_found_by_what_comes_out_of_it_and_its_form_is_told(model, model_type):
    if model_type == "opt-350m":
        with pytest.raises(ValueError, match="OPTForCausalLM has no final norm"):
            architecture.final_norm(model)
        return
    norm, last = architecture.final_norm(model), architecture.sites(model)[-2]
    found = activations.hidden_states(model, SEQUENCES, [last, "final"])
    x = found[last, "prompt_last"].double()
    torch.testing.assert_close(
        gradients.apply_norm(norm, x).float(), found["final", "prompt_last"], atol=1e-4, rtol=1e-4
    )
    by_autograd = torch.autograd.functional.jacobian(lambda x: gradients.apply_norm(norm, x), x[0])
    torch.testing.assert_close(gradients.norm_jacobian(norm, x[0]), by_autograd)


def test_log_probabilities_are_the_model_s_own(model):
    found = likelihoods.response_logps(model, SEQUENCES)
    for tokens, logp in zip(SEQUENCES, found):
        own = passed(model, tokens).logits[0].float().log_softmax(-1)[len(tokens.prompt) - 1 : -1]
        assert logp == pytest.approx(own.gather(1, torch.tensor(tokens.response)[:, None]).sum().item(), abs=1e-3)


def test_greedy_answers_are_those_of_generate_and_dose_0_adds_nothing(model, tokenizer):
    v = 3 * torch.randn(2, architecture.width(model), generator=torch.Generator().manual_seed(1))
    (greedy,) = decoding.sample(model, tokenizer, PROMPTS, 5, None)
    swept = decoding.sample(model, tokenizer, PROMPTS, 5, None, "final", torch.stack([0 * v[0], v[0], v[1]]))
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0].tolist()
        answer = whole[len(prompt) :]
        assert greedy[i] == (answer[: answer.index(2)] if 2 in answer else answer) == swept[0][i]
    assert swept[1] != swept[0] and swept[1] != swept[2]


@pytest.mark.parametrize("site", ["resid[1]", "final"])
def test_steering_moves_the_next_token_as_adding_to_the_states_does(model, tokenizer, site):
    v = torch.randn(architecture.width(model, site), generator=torch.Generator().manual_seed(2))
    (steered,) = decoding.sample(model, tokenizer, PROMPTS, 1, None, site, v[None])
    for prompt, answer in zip(PROMPTS, steered):
        with activations.hooked(model, site, lambda states: torch.cat([states[:, :-1], states[:, -1:] + v], dim=1)):
            token = passed(model, Tokens(prompt)).logits[0, -1].argmax().item()
        assert answer == ([] if token == 2 else [token])


def test_a_steered_model_s_logits_are_those_of_a_plain_hook(model):
    v = torch.randn(architecture.width(model, "resid[1]"), generator=torch.Generator().manual_seed(3))
    vector = SteeringVector(
        v, "resid[1]", "prompt_last", "v", architecture.signature(model), "float32", 1.0, 1, "sweep", "0" * 16
    )
    with vector.applied(model):
        steered = passed(model, SEQUENCES[0]).logits
    handle = architecture.blocks(model)[0].register_forward_hook(
        lambda _, __, out: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
    )
    plain = passed(model, SEQUENCES[0]).logits
    handle.remove()
    torch.testing.assert_close(steered, plain)
    assert not torch.allclose(steered, passed(model, SEQUENCES[0]).logits, atol=1e-3)


def test_the_first_loss_is_log_2_and_the_partner_is_one_of_the_blocks_alone(tmp_path, model_type, tokenizer):
    """Without dropout, whatever it is kept as, and without a router's loss, DPO starts at its reference."""
    base, partner = tmp_path / "base", tmp_path / "partner"
    save(model_type, base)
    model = loading.load(base)[0]
    rejected = [Tokens(tokens.prompt, random_ids(3, 40 + i)) for i, tokens in enumerate(SEQUENCES)]
    pairs = training.training_pairs(model, SEQUENCES, rejected)
    training.train(model, tokenizer, pairs, Recipe(batch_size=3, learning_rate=1e-2), 0, partner)
    assert pd.read_csv(partner / "log.csv")["loss"][0] == pytest.approx(math.log(2), abs=1e-4)
    inside = {id(parameter) for parameter in architecture.blocks(model).parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} <= inside
    both = loading.load_both(base, partner)
    trained = passed(model.eval(), SEQUENCES[0]).logits
    torch.testing.assert_close(passed(both.dpo, SEQUENCES[0]).logits, trained, atol=1e-4, rtol=1e-4)
