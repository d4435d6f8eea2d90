"""A Llama as llama.cpp reads it: its sizes and its weights, written by the writer of llama.cpp's own package gguf."""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(path: Path, model: LlamaForCausalLM) -> None:
    """Write a model without a tokenizer, in float32: its prompts are token ids."""
    out = GGUFWriter(path, "llama")
    add_sizes(out, model.config)
    out.add_tokenizer_model("none")
    for name, weight in tensors(model).items():
        out.add_tensor(name, weight)
    close(out)


def add_sizes(out: GGUFWriter, config: LlamaConfig) -> None:
    """Say how large the model is."""
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)


def tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The weights of a model whose unembedding is its embeddings, by llama.cpp's names."""
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for i in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight, n = state[f"model.layers.{i}.{ours}.weight"], heads.get(ours.split(".")[-1])
            found[f"blk.{i}.{theirs}.weight"] = interleaved(weight, n) if n else weight
    return found


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Queries or keys with the two halves of each head's rotated pairs interleaved, as llama.cpp rotates them."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def close(out: GGUFWriter) -> None:
    """Write all that was added, and end."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
