"""Whether exported vectors do in other libraries what our hook does: in repeng and in steering-vectors themselves."""

import tempfile
from pathlib import Path

import torch
from repeng import ControlModel, ControlVector
from steering_vectors import SteeringVector as TheirVector
from torch import Tensor

from benchmarks.subject import LAYERS, Subject, random_llama, subject
from helpers.lm import architecture, exports
from helpers.lm.steering import SteeringVector

LAYER = LAYERS // 2
TOLERANCE = 1e-5


def main() -> None:
    """Print how far each library's logits are from ours. Raises ValueError where they do not do the same."""
    s = subject()
    v = torch.randn(architecture.width(s.model), generator=torch.Generator().manual_seed(0))
    fits = architecture.signature(s.model)
    vector = SteeringVector(v, f"resid[{LAYER}]", "prompt_last", "v", fits, "float32", 1.0, 1, "bench", "0" * 16)
    ids = torch.tensor(s.prompts[:1])
    with vector.applied(s.model), torch.no_grad():
        ours = s.model(ids).logits
    for name, read in (("repeng", by_repeng), ("steering-vectors", by_steering_vectors)):
        difference = (read(s, vector, ids) - ours).abs().max().item()
        print(f"{name} adds an exported vector as our hook does: logits differ by {difference:.1e} at most")
        if not difference < TOLERANCE:
            raise ValueError(f"The logits of {name} differ by {difference:.2g}: the exported vector is another.")


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


@torch.no_grad()
def by_steering_vectors(s: Subject, vector: SteeringVector, ids: Tensor) -> Tensor:
    """The logits of a model that steering-vectors steers by the same layer's vector, saved and read by us."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.pt"
        torch.save(TheirVector({LAYER - 1: vector.vector}).layer_activations, path)
        ((site, read),) = exports.directions(path).items()
    with TheirVector({architecture.site_layer(s.model, site) - 1: read}).apply(s.model):
        return s.model(ids).logits


if __name__ == "__main__":
    main()
