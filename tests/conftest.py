"""Tiny random models of every architecture, a tiny trained study, and a way to read states that shares no code with
helpers."""

import copy
import gc
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.world import atlas, pretraining

torch.set_num_threads(1)

VOCABULARY, WIDTH, LAYERS, CONTEXT = 61, 32, 3, 64
_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT}
ARCHITECTURES = {  # model type: (its sizes, where it keeps its blocks)
    "llama": (_LLAMA, "model.layers"),
    "qwen2": (_LLAMA, "model.layers"),
    "qwen3": ({**_LLAMA, "head_dim": 16}, "model.layers"),
    "mistral": ({**_LLAMA, "head_dim": 8, "sliding_window": 8}, "model.layers"),
    "gemma": ({**_LLAMA, "head_dim": 8}, "model.layers"),
    "gpt2": (_GPT2, "transformer.h"),
    "gpt_neox": ({**_SIZES, "intermediate_size": 48}, "gpt_neox.layers"),
    "opt": ({**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}, "model.decoder.layers"),
    "phi": ({**_SIZES, "intermediate_size": 48}, "model.layers"),
    "falcon": (_SIZES, "transformer.h"),
    "bloom": ({"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}, "transformer.h"),
    "gptj": ({**_GPT2, "rotary_dim": 4}, "transformer.h"),
}


@cache
def tiny(model_type: str, **changes):
    """A tiny model with random weights, for evaluation. Shared between tests: copy it before changing it."""
    sizes = {**ARCHITECTURES[model_type][0], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, **sizes, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the default is so small that every model is nearly the same
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=ARCHITECTURES)
def model_type(request) -> str:
    return request.param


@pytest.fixture
def model(model_type):
    return tiny(model_type)


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture(scope="session")
def tokenizer():
    pairs = atlas.corpus(atlas.Atlas(), 300, seed=0)
    return pretraining.build_tokenizer([f"{question.text} {text}" for question, text in pairs], 320)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """`shared(name, make)`: a folder that `make(folder)` fills once, whichever of pytest's processes asks first."""
    base = tmp_path_factory.getbasetemp()
    parent = base.parent if base.name.startswith("popen-") else base  # pytest-xdist's workers have a folder each

    def made_once(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = parent / name, parent / f"{name}.done"
        with FileLock(parent / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made_once


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An artefact cache of a test module's own: `pytestmark = pytest.mark.usefixtures("cache")`."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTEER_ARTIFACTS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(shared):
    """The tiny study of studied.py, its base and its partner trained. A module's tests share its artefact cache with
    those of other modules that use it."""
    from studied import PROFILE

    from helpers.study import Study  # not for the tests that need no study

    with pytest.MonkeyPatch.context() as patch:

        def train(folder: Path) -> None:
            patch.setenv("DSTEER_ARTIFACTS", str(folder))
            Study(PROFILE).measure()

        patch.setenv("DSTEER_ARTIFACTS", str(shared("study", train)))
        yield Study(PROFILE)


@pytest.fixture
def plain(trained):
    """The base and the partner of the tiny study by transformers and PEFT alone, in float64."""
    models = {role: AutoModelForCausalLM.from_pretrained(trained.source.path) for role in ("base", "dpo")}
    models["dpo"] = PeftModel.from_pretrained(models["dpo"], trained.chosen.adapter.path).get_base_model()
    return {role: model.double().eval() for role, model in models.items()}


@pytest.fixture
def deltas(trained) -> torch.Tensor:
    """Dose 0 and dose 2 of v* at the final site."""
    v = trained.direction()
    return torch.stack([0 * v, 2 * v])


def pytest_collection_finish(session):
    """What is imported by now stays: collecting garbage, which running out of memory does, need not look at it."""
    gc.collect()
    gc.freeze()


def with_adapter(model, seed: int = 0, target_modules="all-linear"):
    """A copy of a model in a PEFT wrapper with a LoRA adapter that changes it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(model), config).eval()


def random_ids(length: int, seed: int) -> list[int]:
    """Ordinary token ids, none special."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_vector(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def recorded(model, path: str):
    """Yield a dict that each forward pass fills: site -> states; `path` is where the blocks are."""
    blocks, unembedding, found = model.get_submodule(path), model.get_output_embeddings(), {}

    def keep(site):
        return lambda _, args, kwargs: found.update({site: args[0] if args else kwargs["hidden_states"]})

    def keep_output(site):
        return lambda _, __, output: found.update({site: output if isinstance(output, torch.Tensor) else output[0]})

    with ExitStack() as stack:
        hooks = [blocks[0].register_forward_pre_hook(keep("resid[0]"), with_kwargs=True)]
        hooks += [block.register_forward_hook(keep_output(f"resid[{l}]")) for l, block in enumerate(blocks, start=1)]
        hooks += [unembedding.register_forward_pre_hook(keep("final"), with_kwargs=True)]
        for hook in hooks:
            stack.callback(hook.remove)
        yield found


def hook_count(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
