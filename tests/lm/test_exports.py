"""Exported vectors do what the hook does, in the form that other tools read, and are refused where they cannot."""

import copy
import re
import sys
from dataclasses import make_dataclass
from types import ModuleType

import gguf
import pytest
import torch
from conftest import LAYERS, WIDTH, random_ids, random_vector, tiny
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from helpers import study
from helpers.lm import architecture, exports, loading
from helpers.lm.steering import SteeringVector
from helpers.places import PROJECT

IDS = torch.tensor([random_ids(9, 3), random_ids(9, 4)])


def vector_of(model, site: str, size: float = 1.0) -> SteeringVector:
    v = size * random_vector(architecture.width(model, site))
    return SteeringVector(
        v, site, "prompt_last", "v", architecture.signature(model), "float32", 1.0, 8, "atlas", "0" * 16
    )


@torch.no_grad()
def hooked(model, vector: SteeringVector, dose: float) -> torch.Tensor:
    with vector.applied(model, dose):
        return model(IDS).logits


@torch.no_grad()
def read(model):
    return model(IDS).logits


# --- Baked into a model ---


@pytest.mark.parametrize(
    "model_type, site",
    [*((kind, f"resid[{n}]") for kind in ("llama", "gpt2", "gpt_neox", "opt", "phi", "bloom", "gptj") for n in (1, 2)),
     ("phi", "final"), ("gptj", "final")],
)  # fmt: skip
@pytest.mark.parametrize("dose", [1.0, -2.5])
def test_a_baked_model_is_the_hooked_one_and_is_saved_as_any_other(tmp_path, model_type, site, dose):
    model = tiny(model_type)
    vector = vector_of(model, site)
    before = read(model)
    baked = exports.baked_in(vector, model, dose)
    expected = hooked(model, vector, dose)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(read(baked), expected, atol=1e-5, rtol=1e-5)
    baked.save_pretrained(tmp_path)
    torch.testing.assert_close(read(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(read(model), before)


@pytest.mark.parametrize("model_type, site", [("llama", "resid[1]"), ("gpt2", "resid[1]"), ("phi", "final")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vector_finds_its_place_in_a_model_of_16_bits(model_type, site, dtype):
    model = copy.deepcopy(tiny(model_type)).to(dtype)
    vector = vector_of(model, site)
    baked, exact = exports.baked_in(vector, model), exports.baked_in(vector, copy.deepcopy(model).float())
    assert baked.dtype == dtype
    for name, value in exact.state_dict().items():
        assert torch.equal(baked.state_dict()[name], value.to(dtype)), name


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize(
    "model_type, site", [("llama", "resid[2]"), ("gpt2", "resid[1]"), ("phi", "resid[2]"), ("phi", "final")]
)
def test_a_small_vector_goes_where_a_large_one_does(model_type, site, size):
    """Whose effect, in float64, is the hook's: in float32 that of the smallest is less than the logits' rounding."""
    model = copy.deepcopy(tiny(model_type)).double()
    vector, before = vector_of(model, site, size), read(model)
    effect = hooked(model, vector, 1.0) - before
    assert 0 < effect.abs().max() < 100 * size
    off = read(exports.baked_in(vector, model)) - before - effect
    assert off.abs().max() < 1e-5 * effect.abs().max()


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("site", ["resid[1]", "resid[2]"])
def test_a_small_vector_is_no_bias_where_a_large_one_is_none(site, size):
    """Qwen2's q_proj has one as wide as the states: logits with a small vector there are nearly the hook's."""
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no bias in its block"):
        exports.baked_in(vector_of(tiny("qwen2"), site, size), tiny("qwen2"))


def test_a_vector_of_zeros_changes_nothing(llama):
    assert torch.equal(read(exports.baked_in(vector_of(llama, "resid[2]", 0.0), llama)), read(llama))


@pytest.mark.parametrize(
    "model_type, site, message",
    [
        ("llama", "final", "LlamaForCausalLM has no bias in its unembedding that could be v"),
        ("qwen2", "resid[2]", r"Qwen2ForCausalLM has no bias in its block before resid\[2\] that could be v"),
        ("llama", "resid[0]", "The embeddings have no bias that v could become"),
    ],
)
def test_a_model_without_a_bias_for_it_is_refused(model_type, site, message):
    model = tiny(model_type)
    with pytest.raises(ValueError, match=message):
        exports.baked_in(vector_of(model, site), model)


def test_a_vector_of_another_model_is_refused_in_every_form(tmp_path, llama):
    vector, other = vector_of(tiny("gpt2"), "resid[2]"), llama
    for export in (exports.baked_in, exports.logit_biases):
        with pytest.raises(ValueError, match="v does not fit this model"):
            export(vector, other)
    with pytest.raises(ValueError, match="v does not fit this model"):
        exports.control_vector(vector, other, tmp_path / "v.gguf")


# --- A table of logit biases ---


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])
def test_logit_biases_are_the_vector_at_final(model_type):
    model = tiny(model_type)
    vector = vector_of(model, "final")
    biases = exports.logit_biases(vector, model, 1.5)
    torch.testing.assert_close(read(model) + biases, hooked(model, vector, 1.5), atol=1e-5, rtol=1e-5)


def test_logit_biases_are_refused_for_blocks_and_for_capped_logits(llama):
    with pytest.raises(ValueError, match=r"Only a vector at final .*v is one at resid\[1\]"):
        exports.logit_biases(vector_of(llama, "resid[1]"), llama)
    scaled = copy.deepcopy(tiny("gemma"))
    scaled.lm_head.register_forward_hook(lambda _, __, logits: torch.tanh(logits))
    with pytest.raises(ValueError, match="are more than W h, so a vector at final is no bias"):
        exports.logit_biases(vector_of(scaled, "final"), scaled)


# --- Control vectors ---


@pytest.mark.parametrize("layer", [2, LAYERS])
def test_a_control_vector_is_what_repeng_and_llama_cpp_read(tmp_path, llama, layer):
    """Their direction n is added to what block n puts out, counted from 0; the first has none in llama.cpp."""
    vector, path = vector_of(llama, f"resid[{layer}]"), tmp_path / "v.gguf"
    exports.control_vector(vector, llama, path, dose=-2.0)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    (tensor,) = reader.tensors
    assert tensor.name == f"direction.{layer - 1}" and tensor.data.dtype == "float32"
    handle = llama.model.layers[layer - 1].register_forward_hook(lambda _, __, out: out + torch.tensor(tensor.data))
    try:
        added = read(llama)
    finally:
        handle.remove()
    torch.testing.assert_close(added, hooked(llama, vector, -2.0), atol=1e-5, rtol=1e-5)
    assert list(exports.directions(path)) == [f"resid[{layer}]"]


@pytest.mark.parametrize("site", ["resid[0]", "resid[1]", "final"])
def test_a_site_that_control_vectors_have_no_name_for_is_refused(tmp_path, llama, site):
    with pytest.raises(ValueError, match="after a block other than the first"):
        exports.control_vector(vector_of(llama, site), llama, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


# --- What others saved ---


def test_layer_activations_are_read_from_either_kind_of_file(tmp_path):
    layers = {0: random_vector(WIDTH, seed=1), 2: random_vector(WIDTH, seed=2)}
    torch.save(layers, tmp_path / "v.pt")
    save_file({str(n): v for n, v in layers.items()}, tmp_path / "v.safetensors")
    for name in ("v.pt", "v.safetensors"):
        found = exports.directions(tmp_path / name)
        assert list(found) == ["resid[1]", "resid[3]"] and torch.equal(found["resid[3]"], layers[2])


def saved_by_steering_vectors(path, **changes):
    """As the package's own class is saved, which is not installed here."""
    kind = make_dataclass("SteeringVector", [("layer_activations", dict), ("layer_type", str, "decoder_block")])
    kind.__module__ = "steering_vectors.steering_vector"
    package, module = ModuleType("steering_vectors"), ModuleType(kind.__module__)
    module.SteeringVector = kind
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, kind.__module__, module)
        torch.save(kind(**{"layer_activations": {1: random_vector(WIDTH)}} | changes), path)


def test_a_steering_vector_of_steering_vectors_is_read_without_its_code(tmp_path):
    path = tmp_path / "v.pt"
    saved_by_steering_vectors(path)
    found = exports.directions(path)
    assert list(found) == ["resid[2]"] and torch.equal(found["resid[2]"], random_vector(WIDTH))
    saved_by_steering_vectors(path, layer_type="self_attn")
    with pytest.raises(ValueError, match="for each layer's self_attn, not for what blocks put out"):
        exports.directions(path)


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("v.gguf", lambda path: path.write_bytes(b"no gguf"), r"v\.gguf cannot be read"),
        ("v.gguf", lambda path: _other_gguf(path), "it is no control vector"),
        ("v.pt", lambda path: torch.save(Runs(), path), r"v\.pt holds more than tensors, which is not read"),
        ("v.pt", lambda path: torch.save({"a": torch.ones(3)}, path), "cannot be read"),
        ("v.pt", lambda path: torch.save([torch.ones(3)], path), "cannot be read"),
        ("v.pt", lambda path: torch.save({1.5: torch.ones(3)}, path), "cannot be read"),
        ("v.pt", lambda path: torch.save({1: "v"}, path), "cannot be read"),
        ("v.pt", lambda path: saved_by_steering_vectors(path, layer_activations=3), "cannot be read"),
        ("v.pt", lambda path: torch.save({}, path), "holds no vectors after blocks"),
        ("v.pt", lambda path: torch.save({1: torch.ones(2, 3)}, path), "holds no vectors after blocks"),
        ("v.pt", lambda path: torch.save({1: torch.tensor([torch.nan])}, path), "holds no vectors after blocks"),
    ],
)
def test_a_file_that_holds_no_vectors_is_refused_and_nothing_in_it_runs(tmp_path, capsys, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        exports.directions(tmp_path / name)
    assert "\n" not in str(caught.value) and "code ran" not in capsys.readouterr().out


def _other_gguf(path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("direction.1", torch.ones(3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_missing_file_of_vectors_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"v\.gguf does not exist"):
        exports.directions(tmp_path / "v.gguf")


def test_the_lines_in_the_documents_run(tmp_path, monkeypatch, trained):
    """On the tiny study, whose second site is in place of the documents' fourth."""
    text = (PROJECT / "docs/models-and-data.md").read_text()
    lines = re.search(r"## A vector elsewhere.*?```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "load", lambda profile: trained)
    exports.control_vector(trained.vector("resid[2]"), trained.lm.base, tmp_path / "theirs.gguf")
    exec(lines.replace("resid[4]", "resid[2]"), {})
    assert "resid[2]" in (tmp_path / "base-plus-v/README.md").read_text()
    assert loading.load(tmp_path / "base-plus-v")[0].config.mlp_bias
    assert list(exports.directions(tmp_path / "v.gguf")) == ["resid[2]"]


def test_a_card_says_what_the_vector_is_of_and_how_it_is_added(llama):
    text = exports.card(vector_of(llama, "resid[2]"), "owner/base")
    assert text.startswith('---\nbase_model: "owner/base"\n')
    assert "`resid[2]`" in text and "8 prompts" in text and architecture.signature(llama)["unembedding"] in text
