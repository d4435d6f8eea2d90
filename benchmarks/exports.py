"""Whether an exported control vector does in repeng itself what our hook does."""

import tempfile
from pathlib import Path

import torch
from repeng import ControlModel, ControlVector
from torch import Tensor

from benchmarks.subject import LAYERS, Subject, random_llama, subject
from helpers.lm import architecture, exports
from helpers.lm.steering import SteeringVector

LAYER = LAYERS // 2
TOLERANCE = 1e-5


def main() -> None:
    """Print how far repeng's logits are from ours. Raises ValueError where it does not do the same."""
    s = subject()
    v = torch.randn(architecture.width(s.model), generator=torch.Generator().manual_seed(0))
    fits = architecture.signature(s.model)
    vector = SteeringVector(v, f"resid[{LAYER}]", "prompt_last", "v", fits, "float32", 1.0, 1, "bench", "0" * 16)
    ids = torch.tensor(s.prompts[:1])
    with vector.applied(s.model), torch.no_grad():
        ours = s.model(ids).logits
    difference = (by_repeng(s, vector, ids) - ours).abs().max().item()
    print(f"repeng adds an exported vector as our hook does: logits differ by {difference:.1e} at most")
    if not difference < TOLERANCE:
        raise ValueError(f"The logits of repeng differ by {difference:.2g}: the exported vector is another.")


@torch.no_grad()
def by_repeng(s: Subject, vector: SteeringVector, ids: Tensor) -> Tensor:
    """The logits of a model that repeng steers by the GGUF file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        exports.control_vector(vector, s.model, path)
        theirs = ControlVector.import_gguf(path)
    steered = ControlModel(random_llama(), [LAYER - 1])
    steered.set_control(theirs)
    return steered(ids).logits


if __name__ == "__main__":
    main()
