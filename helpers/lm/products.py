"""Products of float32 matrices by oneDNN, where it computes them as exactly as torch's own choice, MKL, and faster.

torch hands them to oneDNN where it may round what is multiplied to bfloat16. Whether it does is another matter, and the
processor's: on one of AMD it rounded nothing and was twice as fast as MKL (docs/speed.md). So it is tried first.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.lm import architecture

ROUNDING = 1e-6  # float32's, of a sum of products; that of bfloat16 is a thousand times as large


@contextmanager
def fast(model: nn.Module) -> Iterator[None]:
    """Inside, what a large float32 model multiplies on a processor is left to oneDNN if it is exact here.

    Nothing changes for others: of small matrices most of the time is not the product's. Attention is then products of
    its own, not torch's fused kernel, which asks oneDNN for many small ones.
    """
    large = model.device.type == "cpu" and model.dtype == torch.float32 and not architecture.is_small(model)
    with ExitStack() as stack:
        if large and _is_exact():
            stack.enter_context(_by_onednn())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def _by_onednn() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _is_exact() -> bool:
    drawn = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=drawn) for _ in range(2))
    with _by_onednn():
        return rounding(a, b) < ROUNDING


def rounding(a: Tensor, b: Tensor) -> float:
    """How far the product of two float32 matrices is from that in float64, as a share of its norm."""
    exact = a.double() @ b.double()
    return ((a @ b - exact).norm() / exact.norm()).item()
