"""Shifts at `final` that depend on the context linearly: z(c) = b + M x(c), added to what the unembedding reads.

What x(c) is decides what such a shift can do: nothing, and it is one constant vector; which token of the answer comes
next, and every token has a vector of its own; the state h(c) itself, and it is a change of the head alone, of the rank
that M has. For every x the nearest one in KL to a partner is had in one way, since

    sum_c KL(goal(.|c) || softmax(W (h(c) + z(c)))) = sum_c logsumexp(W (h(c) + z(c))) - <E(c), z(c)> + constant

is convex in b and M, and needs of the goal only the mean output embedding that it expects, E(c) = sum_y goal(y|c) e_y.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import linear

ROWS = 512  # contexts at a time
Loss = Callable[[Tensor], tuple[float, Tensor]]  # of shifts, (N, d): its mean over contexts, and N times its gradient


@dataclass(frozen=True)
class LinearShift:
    """z = b + M (x - mean) / scale, for features x, (p,). b: (d,), M: (d, p), mean: (p,), scale: one number."""

    b: Tensor
    M: Tensor
    mean: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """The shifts of contexts with these features, (..., p) -> (..., d)."""
        return self.b + ((x.to(self.M) - self.mean) / self.scale) @ self.M.T


def kl_loss(W: Tensor, states: Tensor, expected: Tensor, bias: Tensor | None = None) -> Loss:
    """KL(goal || shifted) less its value without a shift, nats. W: (vocabulary, d); states: h(c), (N, d); expected:
    E(c), (N, d); bias: on the logits, (vocabulary,), where the unembedding has one."""

    unshifted = torch.cat([linear(h, W, bias).logsumexp(1) for h in states.split(ROWS)])

    def loss(z: Tensor) -> tuple[float, Tensor]:
        value = -(unshifted.double().sum() + (expected * z).sum(dtype=torch.float64)).item()
        gradients = []
        for h, e, shift in zip(states.split(ROWS), expected.split(ROWS), z.split(ROWS)):
            logits = linear(h + shift, W, bias)
            partition = logits.logsumexp(1, keepdim=True)
            value += partition.sum(dtype=torch.float64).item()
            gradients.append((logits - partition).exp_() @ W - e)
        return value / len(z), torch.cat(gradients)

    return loss


def nearest(
    loss: Loss, x: Tensor, d: int, penalty: float = 0.0, rank: int | None = None, start: LinearShift | None = None,
    steps: int = 60,
) -> LinearShift:  # fmt: skip
    """The shift of width d that makes a loss smallest over contexts with features x, (N, p), by L-BFGS.

    penalty: on the squares of M; where it is infinite, M is nothing and the shift one constant vector. rank: of M at
    most; then it is found as a product, from the best approximation of that rank (singular values) of what it takes at
    full rank, `start`, which is found first where it is not given. steps: at most, in each of the two.
    """
    mean = x.mean(0)
    scale = float((x - mean).square().mean().sqrt()) if x.numel() else 1.0
    features = (x - mean) / (scale or 1.0)
    if np.isinf(penalty):
        b = nearest(loss, x[:, :0], d, steps=steps).b
        return LinearShift(b, b.new_zeros(d, x.shape[1]), mean, scale or 1.0)
    if rank is not None and start is None:
        start = nearest(loss, x, d, penalty, steps=steps)
    parts = _start(features, d, rank, start)
    shapes = [part.shape for part in parts]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        b, *factors = _unpacked(torch.from_numpy(flat).to(features), shapes)
        M = factors[0] if rank is None else factors[0] @ factors[1]
        value, of_shifts = loss(b + features @ M.T)
        of_M = of_shifts.T @ features / len(features) + 2 * penalty * M
        of_factors = [of_M] if rank is None else [of_M @ factors[1].T, factors[0].T @ of_M]
        gradient = torch.cat([part.flatten() for part in (of_shifts.mean(0), *of_factors)])
        return value + penalty * M.double().square().sum().item(), gradient.double().numpy()

    flat = torch.cat([part.flatten() for part in parts]).double().numpy()
    limits = {"maxiter": steps, "maxfun": 2 * steps, "ftol": torch.finfo(x.dtype).eps / 10, "gtol": 1e-8}
    found = minimize(objective, flat, jac=True, method="L-BFGS-B", options=limits)
    b, *factors = _unpacked(torch.from_numpy(found.x).to(x), shapes)
    M = factors[0] if rank is None else factors[0] @ factors[1]
    return LinearShift(b, M, mean, scale or 1.0)


def _start(features: Tensor, d: int, rank: int | None, start: LinearShift | None) -> list[Tensor]:
    """b and M, or b and M's two factors, that a search starts from."""
    if start is None:
        return [features.new_zeros(d), features.new_zeros(d, features.shape[1])]
    if rank is None:
        return [start.b.to(features), start.M.to(features)]
    # in the norm of what M makes of the features, not of M
    right = torch.linalg.svd(features @ start.M.T.to(features), full_matrices=False).Vh
    onto = right[:rank].T @ right[:rank]
    U, S, V = torch.linalg.svd(onto @ start.M.to(features), full_matrices=False)
    root = S[:rank].sqrt()
    return [start.b.to(features), U[:, :rank] * root, root[:, None] * V[:rank]]


def _unpacked(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]
