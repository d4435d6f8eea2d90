"""Vectors that leave the house: a steering vector as other tools read it, and theirs as sites and vectors.

Other tools add at every position, the prompt's too; so does `SteeringVector.applied`, unless it is told where to begin.
"""

import copy
import json
import operator
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.lm import activations, architecture, steering
from helpers.lm.architecture import FINAL
from helpers.lm.steering import SteeringVector

KIND = "controlvector"  # what repeng and llama.cpp call such a file


def control_vector(vector: SteeringVector, model: PreTrainedModel, path: Path, dose: float = 1.0) -> None:
    """Write dose * v as a GGUF control vector, as repeng and llama.cpp read it: `direction.<n>` is added to what block
    n, counted from 0, puts out: our resid[n + 1].

    Raises ValueError for a site that they have no name for: `final`, the embeddings, and what the first block puts out,
    whose number llama.cpp refuses.
    """
    vector.check_fits(model)
    layer = architecture.site_layer(model, vector.site)
    if layer is None or layer < 2:
        raise ValueError(
            f"A control vector is added after a block other than the first, and {vector.name} is one at {vector.site}: "
            "take one of resid[2] or deeper, or the logit biases of one at final."
        )
    writer = gguf.GGUFWriter(path, KIND)
    writer.add_string(f"{KIND}.model_hint", architecture.causal_lm(model).config.get_text_config().model_type)
    writer.add_uint32(f"{KIND}.layer_count", 1)
    writer.add_tensor(f"direction.{layer - 1}", (dose * vector.vector).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logit_biases(vector: SteeringVector, model: PreTrainedModel, dose: float = 1.0) -> Tensor:
    """What dose * v at `final` adds to each token's logit, W v: (vocabulary,), as a table of logit biases.

    Raises ValueError for a vector of another site, and where logits are more than W h (a soft cap, a scale).
    """
    vector.check_fits(model)
    if vector.site != FINAL:
        raise ValueError(f"Only a vector at final is a table of logit biases; {vector.name} is one at {vector.site}.")
    return steering.bias_on_logits(model, dose * vector.vector)


def baked_in(vector: SteeringVector, model: PreTrainedModel, dose: float = 1.0) -> PreTrainedModel:
    """A copy of the model in which dose * v is a bias: of the unembedding for a vector at `final`, else of the linear
    map that its block puts out by. It is saved and loaded as any other model.

    Raises ValueError where the architecture has no such bias.
    """
    vector.check_fits(model)
    layer = architecture.site_layer(model, vector.site)
    if layer == 0:
        raise ValueError(f"The embeddings have no bias that {vector.name} could become: take a vector after a block.")
    is_16_bits = model.dtype.itemsize < 4  # whose rounding would hide v's place
    exact = copy.deepcopy(model).float() if is_16_bits else model
    size, most, steered = _probed(vector, exact)
    baked = _with_biases(exact)
    for linear in _could_hold(baked, layer):
        kept, v = linear.bias.detach().clone(), vector.vector.to(linear.bias)
        shift = architecture.unembedding(baked).weight @ v if layer is None else v
        linear.bias += size * shift
        if (steering.few_logits(baked) - steered).abs().max() <= most:
            linear.bias.copy_(kept + dose * shift)
            return baked.to(model.dtype)
        linear.bias.copy_(kept)
    where = "unembedding" if layer is None else f"block before {vector.site}"
    raise ValueError(
        f"{type(model).__name__} has no bias in its {where} that could be {vector.name}: add it by a hook, or export "
        "it in another form."
    )


def _probed(vector: SteeringVector, model: PreTrainedModel) -> tuple[float, Tensor, Tensor]:
    """What tells v's place: how often v is as large as the states, beside which its own effect may be rounding, how far
    logits with it may be from the hook's, a thousandth of its effect and their rounding, and the hook's logits."""
    norms: list[float] = []
    with activations.reading(
        model, [vector.site], lambda _, states: norms.append(states.float().norm(dim=-1).mean().item())
    ):
        plain = steering.few_logits(model)
    size = norms[0] / vector.norm if vector.norm else 0.0
    with steering.added(model, vector.site, size * vector.vector):
        steered = steering.few_logits(model)
    rounding = 8 * torch.finfo(torch.float32).eps * steered.abs().max()
    return size, 1e-3 * (steered - plain).abs().max() + rounding, steered


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, in Llama's architecture with biases of zero in the blocks' MLPs."""
    config = copy.deepcopy(model.config)
    if getattr(config, "mlp_bias", None) is not False:
        return copy.deepcopy(model).requires_grad_(False)
    config.mlp_bias = True
    made = type(model)(config).to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)
    lacking = made.load_state_dict(model.state_dict(), strict=False).missing_keys
    for name in lacking:
        made.get_parameter(name).zero_()
    made.generation_config = model.generation_config
    return made


def _could_hold(model: PreTrainedModel, layer: int | None) -> Iterator[nn.Module]:
    """Linear maps with a bias: the unembedding, or those of a block, from its end on."""
    width = architecture.width(model, FINAL if layer is None else "resid[1]")
    within = [architecture.unembedding(model)] if layer is None else architecture.blocks(model)[layer - 1].modules()
    for module in reversed(list(within)):
        bias = getattr(module, "bias", None)
        is_linear = getattr(module, "weight", torch.empty(0)).ndim == 2
        if is_linear and isinstance(bias, Tensor) and (layer is None or bias.shape == (width,)):
            yield module


def directions(path: Path) -> dict[str, Tensor]:
    """What another tool saved, {site: (d,)}: a GGUF control vector (repeng, llama.cpp), or a SteeringVector of
    steering-vectors or its `layer_activations`, by torch.save or as safetensors. No pickled code runs.

    Raises FileNotFoundError or ValueError that names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The file of vectors {path} does not exist.")
    try:
        found = _from_gguf(path) if path.suffix == ".gguf" else _from_tensors(path)
    except pickle.UnpicklingError:  # whose text says how to run what is in it
        raise ValueError(f"The file {path} holds more than tensors, which is not read: save them alone.") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError, OSError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"The file of vectors {path} cannot be read ({said}): save it again.") from error
    wrong = [n for n, v in found.items() if n < 0 or v.ndim != 1 or not v.isfinite().all()]
    if wrong or not found:
        raise ValueError(f"The file {path} holds no vectors after blocks, one finite one each: got {wrong or 'none'}.")
    return {f"resid[{n + 1}]": vector for n, vector in sorted(found.items())}


def _from_gguf(path: Path) -> dict[int, Tensor]:
    reader = gguf.GGUFReader(path)
    kind = reader.get_field("general.architecture")
    if kind is None or kind.contents() != KIND:
        raise ValueError("it is no control vector")
    named = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
    return {int(m[1]): vector for name, vector in named.items() if (m := re.fullmatch(r"direction\.(\d+)", name))}


class _Saved:
    """Stands in for steering-vectors' class when a file is read: it has the fields, and none of the code."""

    layer_activations: dict[int, Tensor]
    layer_type: str


def _from_tensors(path: Path) -> dict[int, Tensor]:
    with torch.serialization.safe_globals([(_Saved, "steering_vectors.steering_vector.SteeringVector")]):
        saved = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if isinstance(saved, _Saved):
        if saved.layer_type != "decoder_block":
            raise ValueError(f"its vectors are for each layer's {saved.layer_type}, not for what blocks put out")
        saved = saved.layer_activations
    return {operator.index(int(n) if isinstance(n, str) else n): vector.float() for n, vector in saved.items()}


def card(vector: SteeringVector, base: str) -> str:
    """The text of a model card for the hub, as Markdown: what the vector is, of which model, and how it is added."""
    about = {"base_model": base, "library_name": "transformers", "tags": ["steering-vector", "dpo"]}
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in about.items())
    made = json.dumps(vector.signature, sort_keys=True)
    return f"""---
{front}
---
# {vector.name}

A steering vector of {base}: it is added to the states at `{vector.site}`, h + λ v, λ = 1 for the whole of it.

- estimated at the position `{vector.position}`, as the mean over {vector.n_prompts} prompts, in {vector.dtype}
- norm {vector.norm:.4g}, beside base states of a mean norm of {vector.state_norm:.4g}
- for this model alone: `{made}`
- profile `{vector.profile}` ({vector.profile_hash})

What it does was measured on the prompts of that profile; on others it may do something else, or more.
"""
