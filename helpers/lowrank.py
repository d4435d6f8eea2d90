"""Rank-k steering: what k directions carry of a partner's displacements, added alike to all prompts or to each its own.

The paper's steering vector is one direction with one coefficient. Here are k directions, the leading right singular
vectors u_1..u_k of the uncentred held-in Delta H, and four ways to choose the coefficients (KINDS):

"mean": <u_j, v*>, the same for every prompt: still one constant vector, whatever k is.
"fitted": what a linear map, fitted on held-in prompts, reads off the prompt's own base state.
"swapped": the control for it, what that map reads off another prompt's state.
"own": <u_j, Delta h(x)>, the prompt's own, which needs the DPO model (averaged over the answer, its chosen answer too).
"""

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from helpers import spectra

KINDS = ("mean", "fitted", "swapped", "own")
RANKS = (1, 2, 3, 4, 8, 16)
PENALTIES = np.logspace(-2, 4, 7)  # of the ridge regression, on standardised states; chosen for each coefficient


def ranks(d: int) -> list[int]:
    """The k that are tried at width d: RANKS below it, and d itself, where nothing is left out."""
    return [k for k in RANKS if k < d] + [d]


def directions(delta: Tensor) -> Tensor:
    """u_1, u_2, ...: the right singular vectors of the uncentred displacements (N, d), a row each, leading first."""
    return spectra.spectrum(delta).directions


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
