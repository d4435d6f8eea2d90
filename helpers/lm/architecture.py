"""Where an architecture keeps its parts, whatever transformers calls them.

Sites follow one scheme for every architecture: `resid[l]`, l = 0..L, is the residual stream after block l (0: what
enters the first block), before any final norm; `final` is the vector that the unembedding reads, after the final norm:
the paper's h.
"""

import hashlib
import re

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

FINAL = "final"
SMALL = 50_000_000  # parameters


def signature(model: nn.Module) -> dict:
    """What a steering vector must find again in a model: its architecture, its sizes and its unembedding's checksum."""
    config = causal_lm(model).config.get_text_config()
    weight = unembedding(model).weight.detach().to("cpu", torch.float32).contiguous()
    return {
        "architecture": type(causal_lm(model)).__name__,
        "width": config.hidden_size,
        "layers": len(blocks(model)),
        "unembedding": hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16],
    }


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without a PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder(model: nn.Module) -> PreTrainedModel:
    """The model without its unembedding; its `last_hidden_state` is the site `final` in every architecture.

    Not `base_model`: in OPT that is a wrapper which a forward pass of the causal LM steps over, hooks and all.
    """
    return causal_lm(model).get_decoder()


def unembedding(model: nn.Module) -> nn.Linear:
    """The output embedding W_U, of shape (vocabulary, width): logit(y) = <h, e_y>, e_y its row y."""
    return causal_lm(model).get_output_embeddings()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order. Raises ValueError where they cannot be found for sure."""
    n_layers = causal_lm(model).config.get_text_config().num_hidden_layers
    lists = [
        (name.count("."), module)
        for name, module in decoder(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        architecture = type(causal_lm(model)).__name__
        raise ValueError(f"No list of {n_layers} blocks in {architecture}: this architecture is not supported.")
    return min(lists, key=lambda item: item[0])[1]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding. Raises ValueError for an architecture without one."""
    norms = [m for m in decoder(model).modules() if type(m).__name__.endswith("Norm") and not list(m.children())]
    inside = {id(m) for block in blocks(model) for m in block.modules()}
    outside = [norm for norm in norms if id(norm) not in inside]
    if not outside:
        architecture = type(causal_lm(model)).__name__
        raise ValueError(f"{architecture} has no final norm: its states enter the unembedding as they are.")
    return outside[-1]


def sites(model: nn.Module) -> list[str]:
    """All sites of a model in order of depth: resid[0], ..., resid[L], final."""
    return [f"resid[{layer}]" for layer in range(len(blocks(model)) + 1)] + [FINAL]


def site_layer(model: nn.Module, site: str) -> int | None:
    """The l of `resid[l]`, None for `final`. Raises ValueError for a site the model does not have."""
    if site == FINAL:
        return None
    match = re.fullmatch(r"resid\[(\d+)\]", site)
    if not match or int(match[1]) > len(blocks(model)):
        raise ValueError(f"Unknown site {site!r}: this model has resid[0] to resid[{len(blocks(model))}] and final.")
    return int(match[1])


def is_small(model: nn.Module) -> bool:
    """Whether several models of this size fit in memory, and one thread computes each as fast as several do."""
    return sum(parameter.numel() for parameter in model.parameters()) <= SMALL


def context_length(model: nn.Module) -> int | None:
    """The longest sequence the model takes in tokens, None where its configuration names no limit."""
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)


def check_lengths(model: nn.Module, lengths: list[int]) -> None:
    """Raise ValueError if a sequence of these lengths (in tokens) is empty or longer than the model's context."""
    limit = context_length(model)
    for i, length in enumerate(lengths):
        if length == 0:
            raise ValueError(f"Prompt {i} is empty: give it at least one token.")
        if limit is not None and length > limit:
            raise ValueError(
                f"Prompt {i} needs {length} tokens and the model's context holds {limit}: shorten it or drop it."
            )
