"""What constant vectors at `final` make of a model's distributions, by algebra: no model is run again.

A vector v added to what the unembedding reads adds a = W v to the logits, the same in every context c: it tilts each
next-token distribution by the same weights e^a. Its partition function sum_y p(y|c) e^(a_y) is a product of matrices
for all contexts and vectors at once, and so is every KL between tilted, untilted and other distributions. Contexts are
given by their log-probabilities, (N, vocabulary), vectors by their tilts A, (vocabulary, arms).
"""

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

ROWS = 128  # contexts at a time


def kl_to_goal(base: Tensor, goal: Tensor, A: Tensor) -> Tensor:
    """KL(goal(.|c) || tilted base(.|c)), nats, in float64: (arms, N)."""
    found = []
    for part in zip(goal.split(ROWS), base.split(ROWS)):
        log_p, log_q = (logps.double().log_softmax(1) for logps in part)  # again: rounded, KL comes out negative
        p = log_p.exp()
        untilted = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
        found.append(untilted[:, None] - p @ A.double() + log_partitions(log_q.exp(), A))
    return torch.cat(found).T


def kl_from_base(base: Tensor, A: Tensor) -> Tensor:
    """KL(tilted base(.|c) || base(.|c)), nats, in float64: (arms, N)."""
    found = []
    for logps in base.split(ROWS):
        log_q = logps.double().log_softmax(1)
        partition, weights = _log_partitions(log_q.exp(), A)
        tilt = (log_q.exp() @ (weights * A.double())) / (log_q.exp() @ weights)  # the mean of a where it is tilted
        found.append(tilt - partition)
    return torch.cat(found).T


def log_partitions(p: Tensor, A: Tensor) -> Tensor:
    """log sum_y p(y|c) e^(a_y), nats, (N, arms), from probabilities in float64."""
    return _log_partitions(p, A)[0]


def _log_partitions(p: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_y p(y|c) e^(a_y), (N, arms), and e^a as a share of its largest, (vocabulary, arms)."""
    top = A.double().amax(0)
    weights = (A.double() - top).exp()
    return (p @ weights).log() + top, weights


def nearest_vector(W: Tensor, base: Tensor, goal: Tensor, steps: int = 200) -> Tensor:
    """v_opt = argmin_v mean_c KL(goal(.|c) || softmax(log base(.|c) + W v)): (d,), float32. It is the ceiling of what a
    constant vector can do: the mean is convex in v, a log-sum-exp of an affine map less a linear one.

    W: the unembedding, (vocabulary, d). All are of one dtype, to whose precision it is found. steps: of L-BFGS, at
    most; it starts from no vector.
    """
    towards = goal.exp().mean(0)
    constant = torch.where(goal > -torch.inf, goal.exp() * (goal - base), 0.0).sum(dtype=torch.float64) / len(base)

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = kl_and_gradient(W, base, towards, torch.from_numpy(v).to(W))
        bar.update()
        return value + constant.item(), gradient.double().numpy()

    limits = {"maxiter": steps, "ftol": 10 * torch.finfo(W.dtype).eps, "gtol": 1e-9}
    with tqdm(desc="steps towards v_opt", leave=False, delay=2) as bar:
        found = minimize(loss, np.zeros(W.shape[1]), jac=True, method="L-BFGS-B", options=limits)
    return torch.from_numpy(found.x).float()


def kl_and_gradient(W: Tensor, base: Tensor, towards: Tensor, v: Tensor) -> tuple[float, Tensor]:
    """mean_c KL(goal(.|c) || softmax(log base(.|c) + W v)) less its value without v, nats, and its gradient,
    W^T mean_c (softmax(log base + W v) - goal): (d,).

    towards: mean_c goal(.|c), (vocabulary,): nothing else of the goal decides which v is best.
    """
    shift, partitions, tilted = W @ v, 0.0, torch.zeros_like(towards)
    for log_q in base.split(ROWS):
        logits = log_q + shift
        partition = logits.logsumexp(1, keepdim=True)
        partitions += partition.sum(dtype=torch.float64).item()
        tilted += (logits - partition).exp_().sum(0)
    value = partitions / len(base) - (towards @ shift).item()
    return value, W.T @ (tilted / len(base) - towards)
