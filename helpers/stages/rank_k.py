"""What rank-k steering adds to each held-out prompt."""

from torch import Tensor

from helpers import spectra
from helpers.stages.artifacts import stage


@stage
def rank_k_deltas(
    heldin_base: Tensor, heldin_moved: Tensor, heldout_base: Tensor, heldout_moved: Tensor
) -> dict[str, Tensor]:
    """{kind: (ranks, N, d)} from states and displacements, (N, d) each (`spectra.coefficients`).

    Kept, since a singular value decomposition may differ in its last bits with the number of threads.
    """
    U = spectra.directions(heldin_moved)
    found = spectra.coefficients(heldin_base, heldin_moved, heldout_base, heldout_moved, U)
    ks = spectra.ranks(U.shape[1])
    return {kind: spectra.truncated(coefficients, U, ks).contiguous() for kind, coefficients in found.items()}
