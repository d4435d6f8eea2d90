"""Loading: what fits is loaded, and what does not is refused in one sentence."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import LAYERS, WIDTH, random_ids, tiny, with_adapter
from huggingface_hub import constants
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from helpers.lm import architecture, decoding, likelihoods, loading
from helpers.lm.batches import Tokens
from helpers.world import pretraining


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A copy of it that a test may spoil."""
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def one_sentence(caught, *words):
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


# --- Loading ---


def test_a_model_is_loaded_as_it_was_saved_for_evaluation(base, tokenizer):
    model, loaded = loading.load(base)
    saved = tiny("llama", vocab_size=len(tokenizer))
    ids = loaded("What is the capital?", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, saved(ids).logits)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert ids[0].tolist() == tokenizer("What is the capital?")["input_ids"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_the_one_asked_for(base, dtype):
    assert loading.load(base, dtype)[0].dtype == getattr(torch, dtype)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        loading.load(tmp_path / "nowhere")
    one_sentence(caught, "nowhere does not exist", "existing folder or a hub id")


def test_a_folder_with_an_at_sign_is_no_revision(base, tmp_path):
    (tmp_path / "me@home").symlink_to(base)
    assert loading.load(tmp_path / "me@home")[0].config.hidden_size == WIDTH


def test_pickled_weights_are_not_read(folder):
    model = tiny("llama", vocab_size=loading.load(folder)[0].config.vocab_size)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError) as caught:
        loading.load(folder)
    one_sentence(caught, str(folder), "holds no safetensors", "convert")


def spoil_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def spoil_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def other_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def other_depth(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS + 1}))


def unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')


def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def an_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "./nowhere"}')


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    "spoil, why",
    [
        (spoil_config, "cannot be loaded"),
        (spoil_weights, "weights that are damaged or cut short"),
        (other_width, "cannot be loaded"),
        (other_depth, "cannot be loaded"),
        (unknown_type, "cannot be loaded"),
        (no_tokenizer, "holds no tokenizer: save it there"),
        (an_adapter, "holds an adapter: give the base that it was trained on as MODEL="),
        (no_config, "holds no model: give the folder of a config.json"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_named_with_the_remedy(folder, spoil, why):
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        loading.load(folder)
    one_sentence(caught, f"The model folder {folder} ", why)


def test_a_hub_id_without_a_network_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        loading.load("nobody/nothing-of-the-kind")
    one_sentence(caught, "nobody/nothing-of-the-kind", "MODEL=<folder>")


def test_a_tokenizer_of_another_model_is_refused(base, folder):
    tiny("llama", vocab_size=20).save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"tokenizer of {folder} has more tokens than the model has embeddings"):
        loading.load(folder)


def test_added_tokens_beyond_the_embeddings_are_no_reason_to_refuse(tokenizer, folder):
    """As Gemma 3 1B has them. What is said with one is refused where it is read."""
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"additional_special_tokens": ["<|picture|>"]})
    more.save_pretrained(folder)
    model, loaded = loading.load(folder)
    spoken = loaded("Look: <|picture|>")["input_ids"]
    with pytest.raises(ValueError, match=f"holds the token {len(tokenizer)}, and the model has {len(tokenizer)} emb"):
        architecture.check_sequences(model, [spoken])


def test_a_file_of_weights_is_refused_for_the_folder_that_holds_it(folder):
    for source in (folder / "model.safetensors", str(folder / "config.json")):
        for read in (loading.load, loading.content_id):
            with pytest.raises(FileNotFoundError, match="is a file: give the folder that holds it"):
                read(source)


def test_an_adapter_with_tokens_of_its_own_is_read_through_its_head(folder):
    """PEFT wraps the head for it where it is tied to the embeddings."""
    model = copy.deepcopy(tiny("gpt2"))
    config = LoraConfig(target_modules=["c_attn"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    assert architecture.vocabulary(adapted) == 61 and architecture.width(adapted) == WIDTH
    sequences = [Tokens([3, 4], [5, 6])]
    found = likelihoods.response_logps(adapted, sequences, torch.zeros(1, WIDTH))
    assert found[0, 0] == pytest.approx(likelihoods.response_logps(tiny("gpt2"), sequences)[0], rel=1e-6)


def test_an_adapter_is_refused_as_a_model_of_its_own(tokenizer, folder, tmp_path):
    adapted = with_adapter(AutoModelForCausalLM.from_pretrained(folder))
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter, and no whole model: .*DPO_MODEL=, or merge it"):
        loading.load(tmp_path / "adapter")


def test_a_partner_that_says_what_its_base_says_is_refused(base, folder, tmp_path):
    untrained = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    untrained.save_pretrained(tmp_path / "untrained")
    for partner in (tmp_path / "untrained", folder):
        with pytest.raises(ValueError, match=f"The partner {partner.name} says just what its base does"):
            loading.load_both(folder, partner)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_an_adapter_that_adds_tokens_is_refused_in_a_sentence(folder, tmp_path, kind):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), kind(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="TUNING adds tokens before the prompt, and changes no state at a site"):
        loading.load_both(folder, tmp_path / "prompt")


def test_a_mixture_of_experts_puts_out_its_text_alone_and_is_exact_in_float64(folder, tokenizer):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(
        **sizes, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, output_router_logits=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model, loaded = loading.load(folder)
    assert decoding.sample(model, loaded, [[5, 6]], 3, 0)[0][0]
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loading.load(folder, "float64")[0](ids).logits.float(), model(ids).logits)


def test_a_tokenizer_without_a_pad_token_gets_its_end_token(tokenizer, folder):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(folder)
    loaded = loading.load(folder)[1]
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    whole = copy.deepcopy(tokenizer)
    loading.ensure_pad_token(whole)
    assert whole.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_with_neither_is_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match=r"neither a pad nor an end-of-sequence token.*tokenizer_config"):
        loading.ensure_pad_token(bare)


# --- Base and partner ---


def test_an_adapter_is_the_partner_of_the_model_that_it_is_on(base, tmp_path, tokenizer):
    alone = tiny("llama", vocab_size=len(tokenizer))
    adapted = with_adapter(alone)
    adapted.save_pretrained(tmp_path / "adapter")
    both = loading.load_both(base, tmp_path / "adapter")
    assert both.base is both.dpo  # one model in memory
    assert not both.dpo.training and not any(p.requires_grad for p in both.dpo.parameters())
    ids = torch.tensor([random_ids(6, 1)])
    with both.playing("base") as model:
        assert torch.equal(model(ids).logits, alone(ids).logits)
    with both.playing("dpo") as model:
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits)
        assert (model(ids).logits - alone(ids).logits).abs().max() > 1e-2
    with pytest.raises(RuntimeError), both.playing("base"):
        raise RuntimeError
    torch.testing.assert_close(both.dpo(ids).logits, adapted(ids).logits)  # the adapter is on again


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """A folder with another whole model, of the same sizes, and the same tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    other = copy.deepcopy(tiny("llama", vocab_size=len(tokenizer)))
    for parameter in architecture.blocks(other).parameters():
        parameter.mul_(1.5)
    other.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_partner_that_is_a_whole_model_is_loaded_beside_the_base(base, whole):
    both = loading.load_both(base, whole)
    ids = torch.tensor([random_ids(6, 1)])
    found = {}
    for role, folder in (("base", base), ("dpo", whole)):
        with both.playing(role) as model:
            found[role] = model(ids).logits
            assert model is getattr(both, role) and not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert torch.equal(found[role], loading.load(folder)[0](ids).logits)
    assert (found["dpo"] - found["base"]).abs().max() > 1e-2
    assert both.tokenizer.get_vocab() == loading.load(base)[1].get_vocab()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_and_partner_have_the_dtype_asked_for(base, whole, dtype):
    both = loading.load_both(base, whole, dtype)
    assert both.base.dtype == both.dpo.dtype == getattr(torch, dtype)


def test_a_partner_with_another_tokenizer_is_refused(base, whole, tmp_path, tokenizer):
    """Of the same size, so that every id is one of both: only the words differ that the ids stand for."""
    shutil.copytree(whole, tmp_path / "other")
    words = [f"{a}{b}" for a in ("zig", "zag", "zog") for b in ("quux", "frob", "blarg", "wibble", "wobble")]
    other = pretraining.build_tokenizer([" ".join(words)] * 5, len(tokenizer))
    assert len(other) <= len(tokenizer) and other.get_vocab() != tokenizer.get_vocab()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError) as caught:
        loading.load_both(base, tmp_path / "other")
    one_sentence(caught, str(base), str(tmp_path / "other"), "must share a tokenizer")


@pytest.mark.parametrize("n", [1, 2], ids=["with an adapter", "of two models"])
def test_an_unknown_role_is_refused(llama, tokenizer, n):
    both = loading.BaseAndPartner(llama, llama if n == 1 else copy.deepcopy(llama), tokenizer)
    with pytest.raises(ValueError, match="Unknown role 'sft': it is base or dpo"), both.playing("sft"):
        pass


@pytest.mark.parametrize(
    "other, target_modules",
    [
        ({"hidden_size": 16}, "all-linear"),
        ({"intermediate_size": 40}, "all-linear"),
        ({"num_hidden_layers": LAYERS - 1}, ["q_proj"]),  # by name in every block, so one block gets no weights
        ({"num_hidden_layers": LAYERS + 1}, ["q_proj"]),
        ({"num_hidden_layers": LAYERS + 1}, "all-linear"),
        ({"model_type": "gpt2"}, "all-linear"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(base, tmp_path, other, target_modules):
    trained_on = tiny(**{"model_type": "llama", **other})
    with_adapter(trained_on, target_modules=target_modules).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError) as caught:
        loading.load_both(base, tmp_path / "adapter")
    one_sentence(caught, "The adapter adapter does not fit the base model", base.name, "train it on this base")


def test_a_partner_of_another_architecture_is_refused_though_its_size_and_tokens_are_the_base_s(
    base, tmp_path, tokenizer
):
    other, own = tiny("mistral", vocab_size=len(tokenizer)), loading.load(base)[0]
    assert architecture.unembedding(other).weight.shape == architecture.unembedding(own).weight.shape
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        loading.load_both(base, tmp_path)
    one_sentence(caught, "differ in architecture or size: a partner is trained from its base")


def test_an_adapter_whose_weights_are_cut_short_is_named_with_the_remedy(base, tmp_path):
    with_adapter(tiny("llama")).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError) as caught:
        loading.load_both(base, tmp_path / "adapter")
    one_sentence(caught, "The adapter adapter has weights that are damaged or cut short", "get them again")


def test_a_missing_partner_is_refused(base, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        loading.load_both(base, tmp_path / "nowhere")
    one_sentence(caught, "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as caught:
        loading.load_both(base, tmp_path / "empty")
    one_sentence(caught, "empty holds no model")


# --- What decides a model's content ---


def test_the_content_id_follows_the_files_that_decide_a_model(folder):
    before = loading.content_id(folder)
    (folder / "README.md").write_text("told otherwise")
    assert loading.content_id(str(folder)) == before
    edited = bytearray((folder / "model.safetensors").read_bytes())
    edited[-1] ^= 1
    (folder / "model.safetensors").write_bytes(edited)
    changed = loading.content_id(folder)
    assert changed != before
    (folder / "tokenizer.json").rename(folder / "other.json")
    assert loading.content_id(folder) not in (before, changed)


def test_the_content_id_of_a_hub_id_names_the_commit_that_its_revision_stands_for_today(monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"

    def fetched(name, file, revision, **_):
        return f"hub/models--org--model/snapshots/{commit}/{file}" if (name, revision) == ("org/model", "v2") else None

    monkeypatch.setattr(loading, "cached_file", fetched)
    assert loading.content_id("org/model@v2") == f"org/model@{commit}"
    with pytest.raises(ValueError) as caught:
        loading.content_id("org/other")
    one_sentence(caught, "The model org/other", "cannot be had")


@pytest.mark.parametrize(
    "error, says",
    [
        ("You are trying to access a gated repo.", "org/model is gated: accept its licence"),
        ("org/model does not appear to have a file named model.safetensors", "org/model holds no safetensors"),
        ("We couldn't connect to the hub", "org/model is not a local folder and cannot be had"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence_with_the_remedy(monkeypatch, error, says):
    def refuse(*_, **__):
        raise OSError(f"{error}\nand much more")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(loading, "cached_file", refuse)
    for ask in (loading.load, loading.content_id):
        with pytest.raises(ValueError) as caught:
            ask("org/model@main")
        one_sentence(caught, says)


def test_no_code_from_a_model_repository_is_run(folder):
    """A checkpoint may name a module of its own to load; that module would leave a mark if it were imported."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    with pytest.raises(ValueError) as caught:
        loading.load(folder)
    one_sentence(caught, "cannot be loaded")
    assert not (folder / "ran").exists()


def test_a_pickled_adapter_is_refused_unread(base, tmp_path):
    with_adapter(loading.load(base)[0]).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ValueError) as caught:
        loading.load_both(base, tmp_path / "adapter")
    one_sentence(caught, "adapter holds no safetensors", "pickled ones are not read")


# --- Devices ---


def test_the_device_auto_is_the_first_that_there_is(monkeypatch):
    assert loading.resolved_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert loading.resolved_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.resolved_device("auto") == "cuda"


def test_a_device_that_there_is_not_is_refused(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as caught:
        loading.load(base, device="cuda")
    one_sentence(caught, "no cuda device", 'device = "cpu"')


@pytest.mark.parametrize("processes, where", [(1, "cuda"), (2, torch.device("cuda", 1))])
def test_each_of_several_processes_loads_onto_its_own_gpu(processes, where, monkeypatch):
    state = SimpleNamespace(use_distributed=processes > 1, device=torch.device("cuda", 1))
    monkeypatch.setattr(loading, "PartialState", lambda: state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading._placement("cuda", "") == {"device_map": {"": where}}


def test_four_bits_without_bitsandbytes_are_refused(base, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as caught:
        loading.load(base, quantize="4bit")
    one_sentence(caught, "needs bitsandbytes", "pip install bitsandbytes")


def test_a_model_spread_over_devices_computes_the_same(base):
    ids = torch.tensor([random_ids(5, 1)])
    spread, alone = loading.load(base, device="spread")[0], loading.load(base)[0]
    assert torch.equal(spread(ids).logits, alone(ids).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_weights_that_are_not_finite_is_refused(folder, value):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "mlp" in name)
    weights[name].view(-1)[3] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        loading.load(folder)
    one_sentence(caught, folder.name, "weights that are not finite in float32", "mend the checkpoint")


def test_by_how_much_the_weights_of_another_model_differ(llama):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.norm.weight += 0.5
    total = sum(w.double().square().sum() for w in llama.parameters()) ** 0.5
    found = loading.BaseAndPartner(llama, other, None).weights_moved
    assert found == pytest.approx((0.25 * WIDTH) ** 0.5 / total.item(), rel=1e-4)
    assert loading.BaseAndPartner(llama, copy.deepcopy(llama), None).weights_moved == 0
    strangers = [copy.deepcopy(llama) for _ in range(2)]
    for seed, model in enumerate(strangers):
        generator = torch.Generator().manual_seed(seed)
        for w in model.parameters():
            w.normal_(generator=generator)
    assert loading.BaseAndPartner(*strangers, None).weights_moved == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.parametrize("modules, moves", [(["q_proj"], False), (["q_proj", "lm_head"], True)])
def test_by_how_much_an_adapter_moves_the_unembedding(llama, modules, moves):
    adapted = with_adapter(llama, target_modules=modules)
    both = loading.BaseAndPartner(adapted, adapted, None)
    found = both.unembedding_moved
    assert math.isnan(both.weights_moved)
    W = llama.lm_head.weight
    expected = ((adapted.merge_and_unload().lm_head.weight - W).norm() / W.norm()).item()
    assert found == pytest.approx(expected, rel=1e-4) and (found > 0) == moves
