"""A LoRA adapter made weaker or of lower rank, on the model that holds it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@contextmanager
def scaled(model: nn.Module, share: float) -> Iterator[None]:
    """Inside, an adapter adds `share` of what it adds to each weight. Raises ValueError where there is none."""
    with _changed(model, lambda A, B: (A, share * B)):
        yield


@contextmanager
def cut(model: nn.Module, rank: int) -> Iterator[None]:
    """Inside, what an adapter adds to each weight is its best approximation of a rank, by singular values. Raises
    ValueError where there is none."""
    with _changed(model, lambda A, B: _cut(A, B, rank)):
        yield


def parameters(model: nn.Module, rank: int | None = None) -> int:
    """How many numbers an adapter has, or one cut to a rank."""
    return sum((rank or len(A)) * (A.shape[1] + len(B)) for A, B in map(_weights, layers(model)))


@contextmanager
@torch.no_grad()
def _changed(model: nn.Module, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Change A and B, whose product B A an adapter adds to a weight, of every layer."""
    adapted = layers(model)
    if not adapted:
        raise ValueError("The partner is no LoRA adapter on its base, so there is none to scale or to cut.")
    before = [[part.clone() for part in _weights(layer)] for layer in adapted]
    try:
        for layer, parts in zip(adapted, before):
            for weight, part in zip(_weights(layer), change(*parts)):
                weight.copy_(part)
        yield
    finally:
        for layer, parts in zip(adapted, before):
            for weight, part in zip(_weights(layer), parts):
                weight.copy_(part)


def layers(model: nn.Module) -> list[LoraLayer]:
    """The layers that an adapter changes; none in a model without one."""
    return [module for module in model.modules() if isinstance(module, LoraLayer) and module.active_adapters]


def _weights(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A, (rank, in), and B, (out, rank)."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight.data, layer.lora_B[name].weight.data


def _cut(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of B A of a rank, in as many rows and columns, zeros the rest."""
    (Q, R), (P, S) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
    U, sizes, V = torch.linalg.svd(R @ S.T)
    root = torch.where(torch.arange(len(sizes)) < rank, sizes, 0).sqrt()
    return (root[:, None] * (V @ P.T)).to(A), (Q @ U * root).to(B)
