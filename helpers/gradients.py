"""The closed forms of the paper's section 2, and what they leave out, for checking against autograd.

Symbols: h, the vector that the unembedding reads, (d,); W, the unembedding, (vocabulary, d), with rows e_y; beta, the
DPO temperature; m, the beta-scaled and reference-corrected margin; sigma, the logistic function. Logits are W h.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def log_ratio(h: Tensor, W: Tensor, w: int, l: int) -> Tensor:
    """log pi(y_w|h) - log pi(y_l|h) = <h, e_w - e_l> for single tokens w, l: the log-partition cancels (C1)."""
    return h @ (W[w] - W[l])


def single_token_margin(h: Tensor, h_ref: Tensor, W: Tensor, w: int, l: int, beta: float) -> Tensor:
    """m = beta * (log-ratio at h - log-ratio at the reference's h_ref), for single-token completions (section 2.2)."""
    return beta * (log_ratio(h, W, w, l) - log_ratio(h_ref, W, w, l))


def single_token_gradient(h: Tensor, h_ref: Tensor, W: Tensor, w: int, l: int, beta: float) -> Tensor:
    """grad_h L_DPO = -beta * sigma(-m) * (e_w - e_l): always along e_w - e_l, wherever h is (C2)."""
    m = single_token_margin(h, h_ref, W, w, l, beta)
    return -beta * torch.sigmoid(-m) * (W[w] - W[l])


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """The mean sigmoid DPO loss, -log sigma(m), from log-probabilities summed over each completion's tokens, (N,)."""
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def completion_logp(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """Sum over t of log pi(y_t | h_t), with h (T, d) and targets (T,)."""
    return torch.log_softmax(h @ W.T, dim=-1).gather(1, targets[:, None]).sum()


def expected_embedding(h: Tensor, W: Tensor) -> Tensor:
    """E_{y ~ pi(.|h_t)}[e_y], for h (T, d): (T, d)."""
    return torch.softmax(h @ W.T, dim=-1) @ W


class Branch(NamedTuple):
    """One completion as the loss sees it: the states that predict it, (T, d), and its tokens, (T,)."""

    h: Tensor
    targets: Tensor


def completion_gradients(
    chosen: Branch, rejected: Branch, W: Tensor, ref_margin: Tensor | float, beta: float
) -> tuple[Tensor, Tensor]:
    """grad of the DPO loss of whole completions at the states that predict a token, chosen (T_w, d), rejected (T_l, d).

    -+ beta * sigma(-m) * (e_{y_t} - E_{y ~ pi(.|h_t)}[e_y]): minus for the chosen branch, plus for the rejected. The
    expected embedding no longer cancels, and h_t differs between the branches. `ref_margin` is the reference's
    log-probability of the chosen completion less that of the rejected one.
    """
    margin = completion_logp(chosen.h, W, chosen.targets) - completion_logp(rejected.h, W, rejected.targets)
    strength = beta * torch.sigmoid(-beta * (margin - ref_margin))
    towards = [W[branch.targets] - expected_embedding(branch.h, W) for branch in (chosen, rejected)]
    return -strength * towards[0], strength * towards[1]


def rms_norm_jacobian(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """d RMSNorm(x) / dx = diag(gain) (I / r - x x^T / (d r^3)), r = sqrt(mean(x^2) + eps), for x (d,): (d, d)."""
    r = (x.pow(2).mean() + eps).sqrt()
    return gain[:, None] * (torch.eye(len(x), dtype=x.dtype) / r - torch.outer(x, x) / (len(x) * r**3))


def layer_norm_jacobian(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """d LayerNorm(x) / dx = diag(gain) (I - 1 1^T / d - z z^T / d) / s, z = (x - mean) / s, s = sqrt(var + eps)."""
    d = len(x)
    s = (x.var(correction=0) + eps).sqrt()
    z = (x - x.mean()) / s
    return gain[:, None] * (torch.eye(d, dtype=x.dtype) - 1 / d - torch.outer(z, z) / d) / s


class NormForm(NamedTuple):
    """What a norm computes of x: (x, less its mean where `centred`) / sqrt(mean square + eps) * gain + bias."""

    centred: bool
    gain: Tensor  # (d,)
    bias: Tensor | None
    eps: float


def apply_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A model's final norm in x's own precision: transformers computes RMSNorm in float32, whatever the dtype."""
    return _applied(norm_form(norm, x), x)


def norm_jacobian(norm: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of a model's final norm, LayerNorm or RMSNorm, at x (d,): (d, d)."""
    form = norm_form(norm, x)
    return (layer_norm_jacobian if form.centred else rms_norm_jacobian)(x, form.gain, form.eps)


def norm_form(norm: nn.Module, x: Tensor) -> NormForm:
    """What a model's norm computes, in x's precision, told by trying: Gemma's gain is 1 + weight, Cohere's RMSNorm in
    name takes the mean off, OLMo's has no weight. Raises ValueError for a norm of another make."""
    probe = torch.linspace(-1, 2, x.shape[-1])
    seen = norm(probe.to(next(norm.parameters(), probe))).detach().to(x)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    weight = torch.ones_like(probe).to(x) if weight is None else weight.detach().to(x)
    bias = None if bias is None else bias.detach().to(x)
    named = [getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)]
    tried = [
        NormForm(centred, gain, bias, float(eps))
        for centred in (False, True)
        for gain in (weight, 1 + weight)
        for eps in named or (1e-5, 1e-6)
    ]
    errors = [(_applied(form, probe.to(x)) - seen).norm() / seen.norm() for form in tried]
    error, form = min(zip(errors, tried), key=lambda both: both[0])
    if not error < 1e-3:
        raise ValueError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm that is known here.")
    return form


def _applied(form: NormForm, x: Tensor) -> Tensor:
    shape = form.gain.shape
    if form.centred:
        return F.layer_norm(x, shape, form.gain, form.bias, form.eps)
    scaled = F.rms_norm(x, shape, form.gain, form.eps)
    return scaled if form.bias is None else scaled + form.bias


def first_difference(chosen: list[int], rejected: list[int]) -> int:
    """The first index at which two completions differ: up to there both are scored from the same states."""
    for t, (a, b) in enumerate(zip(chosen, rejected)):
        if a != b:
            return t
    if len(chosen) == len(rejected):
        raise ValueError("The two completions are the same: a preference pair must differ somewhere.")
    return min(len(chosen), len(rejected))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def token_vectors(W: Tensor, chosen: Sequence[list[int]], rejected: Sequence[list[int]]) -> Tensor:
    """v(i) = e_w - e_l, (N, d), of pairs of completions, w and l the tokens where they first differ (section 2.2)."""
    at = [first_difference(*pair) for pair in zip(chosen, rejected, strict=True)]
    return torch.stack([W[one[t]] - W[other[t]] for one, other, t in zip(chosen, rejected, at)])


def linear_reward(W: Tensor, base: Tensor, partner: Tensor) -> Tensor:
    """The v, (d,), with which <v, e_y> + k(c) comes nearest to the token-level implicit reward,
    log pi_dpo(y|c) - log pi_base(y|c): by least squares over contexts and tokens, these weighed by the base.

    DPO is one constant vector at `final` if and only if nothing is left. base, partner: log-probabilities, (N,
    vocabulary). W: the unembedding, (vocabulary, d).
    """
    gram, moment, _ = _reward_moments(W, base, partner)
    return torch.linalg.lstsq(gram, moment[:, None], driver="gelsd").solution[:, 0]


def linear_share(W: Tensor, base: Tensor, partner: Tensor, v: Tensor) -> float:
    """The share of the token-level implicit reward's variance that <v, e_y> + k(c) explains (`linear_reward`)."""
    gram, moment, total = _reward_moments(W, base, partner)
    return ((2 * v.double() @ moment - v.double() @ gram @ v.double()) / total).item()


def embedding_covariance(W: Tensor, base: Tensor) -> Tensor:
    """sum_c W^T (diag p - p p^T) W, (d, d), of contexts with these log-probabilities, (N, vocabulary): the curvature of
    the KL in a vector that is added at `final`. Two vectors that differ where it is nothing make the same logits."""
    W, p = W.double(), base.double().exp()
    mean = p @ W
    return (W.T * p.sum(0)) @ W - mean.T @ mean


def _reward_moments(W: Tensor, base: Tensor, partner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed over contexts, under the base: the covariance of e_y, (d, d), its covariance with the reward, (d,), and
    the reward's variance. Taking off a context's mean takes off its k(c)."""
    W, p = W.double(), base.double().exp()
    reward = torch.where(p > 0, partner.double() - base.double(), 0.0)
    mean, mean_reward = p @ W, (p * reward).sum(1)
    moment = (p * reward).sum(0) @ W - mean_reward @ mean
    return embedding_covariance(W, base), moment, (p * reward.square()).sum() - mean_reward.square().sum()
