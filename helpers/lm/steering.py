"""Steering: add lambda * v to the hidden states of a site, and keep v with all that is needed to use it elsewhere."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.lm import activations, architecture
from helpers.lm.architecture import FINAL

PROBE = 8  # tokens whose logits tell what a model makes of a vector


@contextmanager
def added(
    model: nn.Module, site: str, delta: Tensor, start: int | Tensor = 0, stop: int | None = None
) -> Iterator[None]:
    """Add `delta` to the states of a site at every forward pass inside: h <- h + delta (section 2.3, delta = lambda v).

    delta: (d,) for every row of the batch, or (batch, d), one a row, so that many doses run in one batch.
    start, stop: the first token position that is steered, one for all rows or (batch,), and the first that no longer
    is, counted from the start of the padded sequence, with a KV cache too. Where delta is exactly zero, not one bit
    changes. Raises ValueError for an unknown site, a delta of another width, and a non-finite delta.
    """
    check(model, site, delta)
    seen = _Positions()
    handle = architecture.decoder(model).register_forward_pre_hook(seen.update, with_kwargs=True)
    try:
        with activations.hooked(model, site, lambda states: moved(states, delta, seen.offset, start, stop)):
            yield
    finally:
        handle.remove()


def moved(states: Tensor, delta: Tensor, offset: int, start: int | Tensor = 0, stop: int | None = None) -> Tensor:
    """States (batch, tokens, d), the first token's at position `offset`, with `delta` added as in `added`."""
    rows = delta.to(states).unsqueeze(-2)  # (1, d) or (batch, 1, d)
    positions = torch.arange(offset, offset + states.shape[1], device=states.device)
    first = torch.as_tensor(start, device=states.device).unsqueeze(-1)  # (1,) or (batch, 1)
    steered = positions >= first  # (tokens,) or (batch, tokens)
    if stop is not None:
        steered = steered & (positions < stop)
    return torch.where(steered[..., None] & (rows != 0), states + rows, states)


class _Positions:
    """Where the tokens of the current forward pass start: after those that the KV cache already holds."""

    offset = 0

    def update(self, _, args, kwargs) -> None:
        cached = kwargs.get("past_key_values")
        self.offset = cached.get_seq_length() if cached is not None else 0


def by_prompt(deltas: Tensor, prompts: int) -> Tensor:
    """Deltas with one for every prompt and token of its answer, (arms, prompts, tokens, d), from those, from (arms,
    prompts, d), the same for every token, or from (arms, d), the same for all prompts too. One prompt's (arms, 1,
    tokens, d) are every prompt's. Of fewer tokens than an answer has, the last one's are those of all that follow.

    Raises ValueError for any other shape, and for no arm at all.
    """
    if not len(deltas):
        raise ValueError("There is no arm to compute: give at least one delta.")
    given = deltas[:, None, None] if deltas.ndim == 2 else deltas[:, :, None] if deltas.ndim == 3 else deltas
    if given.ndim != 4 or given.shape[1] not in (1, prompts) or (deltas.ndim == 3 and given.shape[1] != prompts):
        raise ValueError(
            f"Deltas must be (arms, d), (arms, {prompts}, d) or (arms, 1 or {prompts}, tokens, d), got shape "
            f"{tuple(deltas.shape)}."
        )
    return given.expand(-1, prompts, -1, -1)


def check(model: nn.Module, site: str, delta: Tensor) -> None:
    """Raise ValueError for a site that the model does not have, and for deltas (..., d) that are not finite or of
    another width than its states."""
    architecture.site_layer(model, site)
    width = architecture.width(model, site)
    if delta.shape[-1] != width:
        raise ValueError(
            f"A vector of width {delta.shape[-1]} does not fit a model of width {width}: estimate it on this model."
        )
    if not delta.isfinite().all():
        raise ValueError("The vector to add is not finite: estimate it again from finite states.")


def check_products(model: nn.Module, W: Tensor) -> None:
    """Raise NoBias where logits are more than W h, as `bias_on_logits` does. W: the unembedding, (vocabulary, d)."""
    bias_on_logits(model, W[W.norm(dim=1).argmax()])  # not any row: that of a padding token may be zero


class NoBias(ValueError):
    """A vector at `final` is no constant bias on a model's logits."""


def bias_on_logits(model: nn.Module, delta: Tensor) -> Tensor:
    """What `delta`, (d,), added at `final` adds to each token's logit, W delta: (vocabulary,).

    Raises NoBias where logits are more than W h (a soft cap, a scale), as the logits of a few tokens tell.
    """
    bias = architecture.unembedding(model).weight.detach().float().cpu() @ delta
    with added(model, FINAL, delta):
        steered = few_logits(model)
    if not torch.allclose(steered, few_logits(model) + bias, atol=1e-4, rtol=1e-4):
        name = type(architecture.causal_lm(model)).__name__
        if model.dtype in (torch.bfloat16, torch.float16):
            raise NoBias(f"16 bits are too few to tell whether the logits of {name} are W h: load it in float32.")
        raise NoBias(
            f"The logits of {name} are more than W h, so a vector at final is no bias on them: add it by a hook."
        )
    return bias


@torch.no_grad()
def few_logits(model: nn.Module) -> Tensor:
    """The logits of a few tokens, the same each time."""
    ids = torch.arange(PROBE, device=architecture.causal_lm(model).device) % architecture.vocabulary(model)
    return architecture.causal_lm(model)(input_ids=ids[None], use_cache=False).logits.float().cpu()


@dataclass(frozen=True)
class SteeringVector:
    """A direction v at a site: v* (the mean displacement h_dpo - h_base over prompts), v_token or any other.

    vector: (d,), float32. signature: what the model must be for v to mean anything (architecture.signature). profile:
    the profile's name and hash. `state_norm` is the mean norm of the base states that it moves.
    """

    vector: Tensor
    site: str
    position: str
    name: str
    signature: dict
    dtype: str
    state_norm: float
    n_prompts: int
    profile: str
    profile_hash: str
    norm: float = field(init=False)

    def __post_init__(self):
        if self.vector.ndim != 1 or not self.vector.isfinite().all():
            raise ValueError(f"A steering vector must be one finite vector, got shape {tuple(self.vector.shape)}.")
        object.__setattr__(self, "norm", self.vector.norm().item())

    def check_fits(self, model: nn.Module) -> None:
        """Raise ValueError unless this is the model, or an adapter on it, that the vector was estimated on."""
        found = architecture.signature(model)
        for key, expected in self.signature.items():
            if found[key] != expected:
                raise ValueError(
                    f"The steering vector {self.name} does not fit this model: {key} is {found[key]}, it was estimated "
                    f"with {expected}. Load that model, or estimate the vector again on this one."
                )

    @contextmanager
    def applied(self, model: nn.Module, dose: float = 1.0, start: int | Tensor = 0) -> Iterator[None]:
        """Add dose * v at its site inside the context (see `added`), to a model that it fits."""
        self.check_fits(model)
        with added(model, self.site, dose * self.vector, start):
            yield

    def save(self, folder: Path) -> None:
        """Write `<name>.safetensors` and `<name>.json` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"vector": self.vector.contiguous()}, folder / f"{self.name}.safetensors")
        about = {key: value for key, value in asdict(self).items() if key != "vector"}
        about["checksum"] = _checksum(self.vector)
        (folder / f"{self.name}.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: Path, name: str) -> "SteeringVector":
        """Read what `save` wrote. Raises FileNotFoundError or ValueError that names the file."""
        about_path, vector_path = folder / f"{name}.json", folder / f"{name}.safetensors"
        for path in (about_path, vector_path):
            if not path.is_file():
                raise FileNotFoundError(f"The steering vector file {path} does not exist: save the vector first.")
        try:
            vector = load_file(vector_path)["vector"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"The steering vector file {vector_path} is damaged ({error}): save it again.") from error
        try:
            about = json.loads(about_path.read_text())
            checksum = about.pop("checksum")
            del about["norm"]  # computed anew
            loaded = cls(vector=vector, **about)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The steering vector file {about_path} is damaged ({error}): save it again.") from error
        if checksum != _checksum(vector):
            raise ValueError(f"The files of the steering vector {name} do not belong together: save the vector again.")
        return loaded


def _checksum(vector: Tensor) -> str:
    # not the norm: random controls have the same one as v*
    return hashlib.sha256(vector.float().numpy().tobytes()).hexdigest()[:16]
