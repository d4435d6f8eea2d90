"""A LoRA adapter made weaker, or of lower rank, than it was trained to be, on the model that holds it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, PeftType
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad

BESIDES = ("modules_to_save", "trainable_token_indices", "layer_replication")  # what a LoRA can change besides B A


class NoPlainAdapter(ValueError):
    """A partner differs from its base by more, or by something else, than low-rank matrices."""


@contextmanager
def scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Inside, a partner's adapter changes its base `scale` times as much as it was trained to: 0 is the base and 1 the
    partner, bit for bit. Raises NoPlainAdapter where `check` does."""
    check(model)
    with rescale_adapter_scale(model, float(scale)):
        yield


@contextmanager
@torch.no_grad()
def cut(model: nn.Module, rank: int) -> Iterator[None]:
    """Inside, what a partner's adapter adds to each weight, B A, is its best approximation of a rank, by singular
    values. Raises NoPlainAdapter where `check` does."""
    check(model)
    before = [[part.clone() for part in parts] for parts in _factors(model)]
    try:
        for parts, whole in zip(_factors(model), before):
            _write(parts, _cut(*whole, rank))
        yield
    finally:
        for parts, whole in zip(_factors(model), before):
            _write(parts, whole)


def check(model: nn.Module) -> None:
    """Raise NoPlainAdapter, in a sentence, for a model that is not its base with a plain LoRA adapter on it."""
    if not isinstance(model, PeftModel):
        raise NoPlainAdapter("The partner is a whole model and no adapter: there is nothing to scale or to cut.")
    config = model.peft_config[model.active_adapter]
    if config.peft_type != PeftType.LORA:
        raise NoPlainAdapter(f"The partner's adapter is {config.peft_type.value} and no LoRA: it is no product B A.")
    besides = [name for name in BESIDES if getattr(config, name)] + ["bias"] * (
        config.bias != "none" or config.lora_bias
    )
    if any(module.lora_variant for module in model.modules() if isinstance(module, LoraLayer)):
        besides.append("a variant of LoRA, such as DoRA")
    if besides:
        raise NoPlainAdapter(f"The partner's adapter holds more than B A ({', '.join(besides)}): that would stay.")


def is_plain(model: nn.Module) -> bool:
    """Whether a model is its base with a plain LoRA adapter on it."""
    try:
        check(model)
    except NoPlainAdapter:
        return False
    return True


def parameters(model: nn.Module, rank: int | None = None) -> int:
    """How many numbers an adapter has, or one cut to a rank."""
    return sum(min(rank or len(A), len(A)) * (A.shape[1] + len(B)) for A, B in _factors(model))


def _factors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A, (rank, in), and B, (out, rank), of each weight that an adapter changes."""
    name = model.active_adapter
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    found = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers if name in layer.lora_A]
    embeddings = [layer for layer in layers if name in layer.lora_embedding_A]
    return found + [(layer.lora_embedding_A[name], layer.lora_embedding_B[name]) for layer in embeddings]


def _write(parts: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
    for part, value in zip(parts, values):
        part.copy_(value)


def _cut(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of B A of a rank, in as many rows and columns, zeros the rest."""
    (Q, R), (P, S) = (torch.linalg.qr(factor.cpu().double()) for factor in (B, A.T))  # not every device has float64
    U, sizes, V = torch.linalg.svd(R @ S.T, full_matrices=False)
    root = torch.where(torch.arange(len(sizes)) < rank, sizes, 0).sqrt()
    beyond = (0, len(A) - len(sizes))  # an adapter may have a higher rank than its weight can
    down, up = pad(root[:, None] * (V @ P.T), (0, 0, *beyond)), pad(Q @ U * root, beyond)
    return down.to(A), up.to(B)
