"""Where an architecture keeps its parts, whatever transformers calls them.

Sites follow one scheme for every architecture: `resid[l]`, l = 0..L, is the residual stream after block l (0: what
enters the first block), before any final norm; `final` is the vector that the unembedding reads, after the final norm:
the paper's h.
"""

import hashlib
import re
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

FINAL = "final"
SMALL = 50_000_000  # parameters
MEDIUM = 200_000_000


def signature(model: nn.Module) -> dict:
    """What a steering vector must find again in a model: its architecture, its sizes and its unembedding's checksum."""
    weight = unembedding(model).weight.detach().to("cpu", torch.float32).contiguous()
    return {
        "architecture": type(causal_lm(model)).__name__,
        "width": width(model),
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


def vocabulary(model: nn.Module) -> int:
    """How many tokens the unembedding scores."""
    return unembedding(model).weight.shape[0]


def width(model: nn.Module, site: str = FINAL) -> int:
    """How many coordinates a state has: at `final` as many as the unembedding reads, which are fewer in OPT-350m."""
    if site == FINAL:
        return unembedding(model).weight.shape[1]
    return causal_lm(model).config.get_text_config().hidden_size


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


@torch.no_grad()
def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding: the one that `final` comes out of, as a forward pass of one
    token tells. Raises ValueError for an architecture without one."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    norms = [m for m in decoder(model).modules() if "norm" in type(m).__name__.lower() and id(m) not in inside]
    came_out: list[tuple[nn.Module, Tensor]] = []
    hooks = [norm.register_forward_hook(lambda norm, _, out: came_out.append((norm, out))) for norm in norms]
    try:
        one = torch.zeros((1, 1), dtype=torch.long, device=causal_lm(model).device)
        final = decoder(model)(input_ids=one, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    found = [norm for norm, out in came_out if isinstance(out, Tensor) and torch.equal(out, final)]
    if not found:
        architecture = type(causal_lm(model)).__name__
        raise ValueError(f"{architecture} has no final norm: its states enter the unembedding as they are.")
    return found[-1]


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
    return _parameters(model) <= SMALL


def _parameters(model: nn.Module) -> int:
    """Without an adapter's, which may be loaded or not."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)


def fits_beside_another(model: nn.Module) -> bool:
    """Whether two models of this size can be trained beside each other, on processors: in float32, short pairs, one of
    134 M parameters took about 2 GB."""
    return is_small(model) or (model.device.type == "cpu" and _parameters(model) <= MEDIUM)


def context_length(model: nn.Module) -> int | None:
    """The longest sequence the model takes in tokens, None where its configuration names no limit."""
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)


def check_sequences(model: nn.Module, sequences: Sequence[Sequence[int]], more: int = 0) -> None:
    """Raise ValueError if a sequence of token ids is empty, or with so many `more` tokens longer than the model's
    context, or holds a token of which the model has no embedding."""
    limit, known = context_length(model), causal_lm(model).get_input_embeddings().weight.shape[0]
    for i, ids in enumerate(sequences):
        if not ids:
            raise ValueError(f"Prompt {i} is empty: give it at least one token.")
        if limit is not None and len(ids) + more > limit:
            raise ValueError(
                f"Prompt {i} needs {len(ids) + more} tokens and the model's context holds {limit}: shorten it or drop "
                "it."
            )
        if max(ids) >= known:
            raise ValueError(
                f"Prompt {i} holds the token {max(ids)}, and the model has {known} embeddings: its tokenizer is "
                "another model's, or the text names a token that it never learned."
            )
