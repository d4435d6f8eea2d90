"""Spectra of states and displacements: what the paper's section 4 measures, with definitions and nulls.

H is (N, d), a row an example. "Centred" means that the mean row was taken off. An uncentred matrix with a large mean
is near rank one by construction, so everything is given both ways and beside a null.

Rank-k directions: what k of them carry of a partner's displacements, added alike to all prompts or to each its own. The
paper's steering vector is one direction with one coefficient. Here are k, the leading right singular vectors u_1..u_k
of the uncentred held-in Delta H, and four ways to choose the coefficients (KINDS):

"mean": <u_j, v*>, the same for every prompt: still one constant vector, whatever k is.
"fitted": what a linear map, fitted on held-in prompts, reads off the prompt's own base state.
"swapped": the control for it, what that map reads off another prompt's state.
"own": <u_j, Delta h(x)>, the prompt's own, which needs the DPO model (averaged over the answer, its chosen answer too).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

KINDS = ("mean", "fitted", "swapped", "own")
RANKS = (1, 2, 3, 4, 8, 16)
PENALTIES = np.logspace(-2, 4, 7)  # of the ridge regression, on standardised states; chosen for each coefficient


@dataclass(frozen=True)
class Spectrum:
    """Of a matrix in float64: its singular values, largest first, and its right singular vectors."""

    matrix: Tensor

    @cached_property
    def values(self) -> Tensor:
        """sigma_1, sigma_2, ...: (min(N, d),)."""
        return torch.linalg.svdvals(self.matrix)  # much faster than with the vectors, which few ask for

    @cached_property
    def directions(self) -> Tensor:
        """u_1, u_2, ...: (min(N, d), d)."""
        return torch.linalg.svd(self.matrix, full_matrices=False).Vh

    @property
    def ratio(self) -> float:
        """sigma_2 / sigma_1 (section 4.1: below 0.1 "typically")."""
        return (self.values[1] / self.values[0]).item()

    @property
    def shares(self) -> Tensor:
        """p_k = sigma_k^2 / sum sigma^2: the share of the squared Frobenius norm that direction k holds."""
        return self.values.square() / self.values.square().sum()

    @property
    def entropy(self) -> float:
        """Spectral entropy: the Shannon entropy of p_k, in nats. Undefined in the paper; this is our definition."""
        p = self.shares[self.shares > 0]
        return -(p * p.log()).sum().item()

    @property
    def effective_rank(self) -> float:
        """exp(entropy): k equal singular values give k (Roy and Vetterli 2007, on the squared values)."""
        return math.exp(self.entropy)

    def mass(self, k: int) -> Tensor:
        """sigma_j / sum sigma for the first k: the normalisation of our Figure 4b, (k,)."""
        return (self.values / self.values.sum())[:k]


def spectrum(H: Tensor, centred: bool = False) -> Spectrum:
    """The spectrum of H, (N, d). Raises ValueError where fewer than two rows or columns, or only zeros, are given."""
    H = H.double()
    if min(H.shape) < 2:
        raise ValueError(f"A spectrum needs at least two rows and two columns, got {tuple(H.shape)}.")
    rounding = 1e-14 * H.norm()  # what centring equal rows can leave behind
    if centred:
        H = H - H.mean(0)
    if H.norm() <= rounding:
        raise ValueError("All rows are zero (or equal, when centred): there is no spectrum to speak of.")
    return Spectrum(H)


def random_displacements(norms: Tensor, d: int, seed: int) -> Tensor:
    """The null: isotropic displacements, one a row, with exactly these norms, (N,) -> (N, d)."""
    directions = torch.randn(len(norms), d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return directions * (norms.double() / directions.norm(dim=1))[:, None]


def random_like(H: Tensor, n: int, seed: int) -> Tensor:
    """n random directions with the covariance of the rows of H, (N, d): (n, d), float64."""
    H = H.double()
    weights = torch.randn(n, len(H), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights @ (H - H.mean(0)) / math.sqrt(len(H))


def matched_shifts(v: Tensor, mean: Tensor, n: int, seed: int) -> Tensor:
    """The null for what a shift v, (d,), does to states with this mean, (d,): n random shifts with v's norm and its
    cosine to the mean, (n, d). Whatever lies along the mean lowers the uncentred entropy."""
    v, unit = v.double(), mean.double() / mean.double().norm()
    along = (v @ unit) * unit
    across = random_displacements(torch.ones(n), len(v), seed)
    across = across - (across @ unit)[:, None] * unit
    return along + (v - along).norm() * across / across.norm(dim=1, keepdim=True)


def cosines(rows: Tensor, v: Tensor) -> Tensor:
    """cos(row, v) for every row of (N, d), in float64."""
    return torch.nn.functional.cosine_similarity(rows.double(), v.double()[None], dim=1)


def example_mass(H: Tensor, directions: Tensor) -> Tensor:
    """The share of each row's squared norm that lies along each unit direction: (N, d), (k, d) -> (N, k)."""
    H = H.double()
    return (H @ directions.T).square() / H.square().sum(1, keepdim=True)


def shifted_entropies(H: Tensor, shifts: Tensor) -> Tensor:
    """The spectral entropy of H + shift, every row moved alike, for each of `shifts`: (N, d), (k, d) -> (k,)."""
    H, shifts = H.double(), shifts.double()
    squares = torch.stack([torch.linalg.eigvalsh(_gram(H + shift)) for shift in shifts]).clamp(min=0)
    return torch.special.entr(squares / squares.sum(dim=1, keepdim=True)).sum(dim=1)


def _gram(H: Tensor) -> Tensor:
    """The smaller of H H' and H' H: their eigenvalues are the squared singular values of H, and zeros."""
    return H @ H.T if len(H) < H.shape[1] else H.T @ H


# --- Rank-k directions ---


def ranks(d: int) -> list[int]:
    """The k that are tried at width d: RANKS below it, and d itself, where nothing is left out."""
    return [k for k in RANKS if k < d] + [d]


def directions(delta: Tensor) -> Tensor:
    """u_1, u_2, ...: the right singular vectors of the uncentred displacements (N, d), a row each, leading first."""
    return spectrum(delta).directions


def coefficients(
    heldin_base: Tensor, heldin_delta: Tensor, base: Tensor, delta: Tensor, U: Tensor
) -> dict[str, Tensor]:
    """{kind: (M, k)}: the coefficients along U, (k, d), for M prompts with these base states and displacements (M, d).

    heldin_base, heldin_delta: (N, d), the states and displacements that means and linear map are fitted on.
    """
    along = heldin_delta.double() @ U.T
    reader = make_pipeline(StandardScaler(), RidgeCV(PENALTIES, alpha_per_target=True))
    fitted = reader.fit(heldin_base.double().numpy(), along.numpy()).predict(base.double().numpy())
    fitted = torch.from_numpy(fitted.reshape(len(base), -1))
    return {
        "mean": along.mean(0).expand(len(base), -1),
        "fitted": fitted,
        "swapped": fitted.roll(1, 0),  # prompts are in random order
        "own": delta.double() @ U.T,
    }


def truncated(coefficients: Tensor, U: Tensor, ks: list[int]) -> Tensor:
    """sum_{j <= k} c_j(x) u_j for each k: (M, K) and (K, d) -> (len(ks), M, d), float32."""
    return torch.stack([coefficients[:, :k] @ U[:k] for k in ks]).float()
