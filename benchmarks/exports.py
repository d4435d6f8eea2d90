"""Whether vectors that leave the house do in repeng and steering-vectors what our hook does, and theirs are read."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import steering_vectors
import torch
from repeng import ControlModel, ControlVector
from torch import Tensor

from benchmarks.subject import LAYERS, Subject, random_llama, subject
from helpers.lm import architecture, exports
from helpers.lm.steering import SteeringVector

LAYER = LAYERS // 2
TOLERANCE = 1e-5


def main() -> None:
    """Print how far the peers' logits are from ours. Raises ValueError where one does not do the same."""
    s = subject()
    vector = some_vector(s)
    ids = torch.tensor(s.prompts[:1])
    with vector.applied(s.model), torch.no_grad():
        ours = s.model(ids).logits
    peers: dict[str, Callable[[Subject, SteeringVector, Tensor, Path], Tensor]] = {
        "repeng": by_repeng, "steering-vectors": by_steering_vectors,
    }  # fmt: skip
    for name, by_peer in peers.items():
        with tempfile.TemporaryDirectory() as folder:
            difference = (by_peer(s, vector, ids, Path(folder)) - ours).abs().max().item()
        print(f"{name} adds the vector as our hook does: logits differ by {difference:.1e} at most")
        if not difference < TOLERANCE:
            raise ValueError(f"The logits of {name} differ by {difference:.2g}: what it adds is another vector.")


def some_vector(s: Subject) -> SteeringVector:
    """A random vector after a block in the middle of the model."""
    v = torch.randn(architecture.width(s.model), generator=torch.Generator().manual_seed(0))
    fits = architecture.signature(s.model)
    return SteeringVector(v, f"resid[{LAYER}]", "prompt_last", "v", fits, "float32", 1.0, 1, "bench", "0" * 16)


@torch.no_grad()
def by_repeng(s: Subject, vector: SteeringVector, ids: Tensor, folder: Path) -> Tensor:
    """The logits of a model that repeng steers by our file. Raises ValueError where its own file is read otherwise."""
    exports.control_vector(vector, s.model, folder / "ours.gguf")
    held = ControlVector.import_gguf(folder / "ours.gguf")
    held.export_gguf(folder / "theirs.gguf")
    check_read(folder / "theirs.gguf", vector)
    steered = ControlModel(random_llama(), [LAYER - 1])
    steered.set_control(held)
    return steered(ids).logits


@torch.no_grad()
def by_steering_vectors(s: Subject, vector: SteeringVector, ids: Tensor, folder: Path) -> Tensor:
    """The logits of a model that steering-vectors steers. Raises ValueError where what it holds is read otherwise."""
    held = steering_vectors.SteeringVector({LAYER - 1: vector.vector})
    torch.save(held, folder / "theirs.pt")
    check_read(folder / "theirs.pt", vector)
    with held.apply(s.model):
        return s.model(ids).logits


def check_read(path: Path, vector: SteeringVector) -> None:
    """Raise ValueError unless a peer's file is read as the vector at its site."""
    found = exports.directions(path)
    if list(found) != [vector.site] or not torch.equal(found[vector.site], vector.vector):
        raise ValueError(f"{path.name} is read as vectors at {', '.join(found)}, other than the one that was saved.")


if __name__ == "__main__":
    main()
