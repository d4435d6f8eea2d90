"""Loading a base model and its DPO partner, each from a folder or the hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.logging import disable_progress_bar

from helpers.lm import hub, products
from helpers.lm.architecture import blocks, causal_lm, unembedding, vocabulary
from helpers.lm.naming import looks_local, refuse_missing

disable_progress_bar()  # transformers' own bars; ours say what takes long
ROLES = ("base", "dpo")


@dataclass
class BaseAndPartner:
    """A base model and its DPO model: one loaded model whose adapter is off (`base`) or on (`dpo`), or two models."""

    base: nn.Module
    dpo: nn.Module
    tokenizer: PreTrainedTokenizerBase

    @property
    def unembedding_moved(self) -> float:
        """||W_dpo - W_base|| / ||W_base|| of the unembeddings (Frobenius); adapters on the blocks leave it at 0."""
        before, after = map(self._effective_unembedding, ROLES)
        return ((after - before).norm(dtype=torch.float32) / before.norm(dtype=torch.float32)).item()

    @property
    def weights_moved(self) -> float:
        """||W_dpo - W_base|| / ||W_base|| over all weights of two whole models (Frobenius): near zero where one was
        trained from the other, about 1.4 where they are independent and of one size. nan for an adapter."""
        if self.base is self.dpo or isinstance(self.dpo, PeftModel):
            return float("nan")
        before = dict(self.base.named_parameters())
        moved = sum((w.float() - before[name].float()).square().sum().item() for name, w in self.dpo.named_parameters())
        return (moved / sum(w.float().square().sum().item() for w in before.values())) ** 0.5

    @torch.no_grad()
    def _effective_unembedding(self, role: str) -> Tensor:
        """W_U as a role applies it: an adapter may be on it too."""
        with self.playing(role) as model:
            head = unembedding(model)
            if isinstance(head, nn.Linear):
                return head.weight.cpu()
            width = head.weight.shape[1]
            return head(torch.eye(width, dtype=head.weight.dtype, device=head.weight.device)).T.cpu()

    @contextmanager
    def playing(self, role: str) -> Iterator[nn.Module]:
        """Yield the model playing `base` or `dpo`; afterwards an adapter is on again."""
        if role not in ROLES:
            raise ValueError(f"Unknown role {role!r}: it is {' or '.join(ROLES)}.")
        model = getattr(self, role)
        off = role == "base" and self.base is self.dpo
        with model.disable_adapter() if off else nullcontext(), products.fast(model):
            yield model


def load(
    source: str | Path, dtype: str = "float32", device: str = "cpu", quantize: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer from a local folder or a hub id, `@revision` allowed, for evaluation.

    device, quantize: as in a Profile. No code from the model's repository is run and only safetensors are read. Raises
    FileNotFoundError or ValueError with one sentence that names the source and the remedy.
    """
    hub.offline_without_a_network()
    name, revision = name_and_revision(source)
    kwargs = {"revision": revision, "trust_remote_code": False}
    if not Path(name).is_dir():
        refuse_missing(name)
    placed = _placement(device, quantize)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **kwargs, **placed
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(_cannot_load(name, error)) from error
    if report["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise ValueError(_cannot_load(name, f"its weights lack {min(report['missing_keys'])}."))
    _check_whole(name, model, tokenizer, dtype)
    ensure_pad_token(tokenizer)
    if dtype == "float64":
        model.set_experts_implementation("eager")  # torch multiplies experts' matrices together in 32 bits or fewer
    _sample_plainly(model, tokenizer)
    return model.eval().requires_grad_(False), tokenizer


def _check_whole(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
    """Raise ValueError for an adapter, for a tokenizer of another model, and for weights that are not finite."""
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers loads its base with it, and says nothing
        raise ValueError(
            f"{name} is an adapter, and no whole model: give the base that it was trained on as MODEL= and it as "
            "DPO_MODEL=, or merge it into that base first."
        )
    known, added = model.get_input_embeddings().weight.shape[0], tokenizer.added_tokens_decoder
    if any(token >= known and token not in added for token in tokenizer.get_vocab().values()):  # Gemma 3 1B adds some
        raise ValueError(
            f"The tokenizer of {name} has more tokens than the model has embeddings: they do not belong together."
        )
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(
            f"The model {name} has weights that are not finite in {dtype}: take float32, or mend the checkpoint."
        )


def _sample_plainly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop a repetition penalty or forbidden tokens that came with the checkpoint: they would bend what is sampled.
    And what a forward pass is told to put out besides."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**special)
    config = model.config.get_text_config()
    for name, token in special.items():
        setattr(config, name, token)
    if getattr(config, "output_router_logits", False):  # of a mixture of experts: only its own training loss reads them
        config.output_router_logits = False


def resolved_device(device: str) -> str:
    """What "auto" means on this machine; any other device as it is. Raises ValueError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "spread": True}
    if device == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if not there[device]:
        raise ValueError(f'There is no {device} device here: set device = "cpu" or "auto" in the profile.')
    return device


def _placement(device: str, quantize: str) -> dict:
    """What tells transformers where the weights go and in which form."""
    device = resolved_device(device)
    placed = {"device_map": "auto" if device == "spread" else {"": device}}
    if device == "cpu" and not quantize:
        return {}
    if device == "cuda" and PartialState().use_distributed:  # one of several processes has a GPU of its own
        placed = {"device_map": {"": PartialState().device}}
    if quantize:
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "Loading in 4 bits needs bitsandbytes, which is not installed: run `pip install bitsandbytes`, or set "
                'quantize = "" in the profile.'
            )
        placed["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return placed


def load_both(
    source: str | Path, partner: str | Path, dtype: str = "float32", device: str = "cpu", quantize: str = ""
) -> BaseAndPartner:
    """Load a base model with its DPO partner, a PEFT adapter or a whole model, each a folder or a hub id.

    Raises ValueError where the two do not fit.
    """
    model, tokenizer = load(source, dtype, device, quantize)
    adapter = adapter_folder(partner)
    if adapter is not None:
        adapted = _with_adapter(model, source, adapter)
        return _differing(BaseAndPartner(adapted, adapted, tokenizer), partner)
    dpo, its_tokenizer = load(partner, dtype, device, quantize)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The models {source} and {partner} have different tokens: base and partner must share a tokenizer."
        )
    its, own = ((type(causal_lm(one)), len(blocks(one)), unembedding(one).weight.shape) for one in (dpo, model))
    if its != own:
        raise ValueError(
            f"The models {source} and {partner} differ in architecture or size: a partner is trained from its base."
        )
    return _differing(BaseAndPartner(model, dpo, tokenizer), partner)


@torch.no_grad()
def _differing(both: BaseAndPartner, partner: str | Path) -> BaseAndPartner:
    """The two, where a forward pass of a few tokens tells them apart. Raises ValueError where it does not."""
    said = []
    for role in ROLES:
        with both.playing(role) as model:
            few = torch.arange(min(8, vocabulary(model)), device=causal_lm(model).device)
            said.append(causal_lm(model)(input_ids=few[None], use_cache=False).logits)
    if torch.equal(*said):
        raise ValueError(
            f"The partner {Path(partner).name} says just what its base does: it was not trained, or is the base itself."
        )
    for model in (both.base, both.dpo):  # which PEFT, to put an adapter on again, makes trainable
        model.requires_grad_(False)
    return both


def adapter_folder(partner: str | Path) -> Path | None:
    """The folder of a partner that is a PEFT adapter, fetched from the hub where it is there; None for a whole model.

    Raises ValueError for an adapter without safetensors: pickled weights are not read.
    """
    name, revision = name_and_revision(partner)
    if looks_local(name) and not Path(name).is_dir():
        return None
    find = partial(cached_file, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    try:
        settings, weights = find("adapter_config.json"), find("adapter_model.safetensors")
    except OSError:  # said where the whole model is looked for
        return None
    if settings is None:
        return None
    if weights is None:
        raise ValueError(f"The adapter {name} holds no safetensors: convert its weights; pickled ones are not read.")
    return Path(settings).parent


def name_and_revision(source: str | Path) -> tuple[str, str | None]:
    """A folder and None, or a hub id and what follows its `@`."""
    if Path(source).is_dir():
        return str(source), None
    name, _, revision = str(source).partition("@")
    return name, revision or None


def _with_adapter(model: PreTrainedModel, source: str | Path, adapter: Path) -> PeftModel:
    try:
        kind = PeftConfig.from_pretrained(str(adapter))
        if kind.is_prompt_learning:
            raise ValueError(f"{kind.peft_type.value} adds tokens before the prompt, and changes no state at a site")
        adapted = PeftModel.from_pretrained(model, str(adapter))
        unmatched = load_peft_weights(str(adapter), device="cpu").keys() ^ get_peft_model_state_dict(adapted).keys()
        if unmatched:  # PEFT leaves out what it finds no place for, and keeps untrained what it finds no weights for
            raise KeyError(f"{min(unmatched)} is in one of them only")
    except SafetensorError as error:
        raise ValueError(
            f"The adapter {Path(adapter).name} has weights that are damaged or cut short ({error}): get them again."
        ) from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        lines = str(error.args[0] if isinstance(error, KeyError) else error).strip().splitlines()
        reason = lines[min(1, len(lines) - 1)].strip()  # the first of torch's only announces the others
        raise ValueError(
            f"The adapter {Path(adapter).name} does not fit the base model {Path(source).name} ({reason}): "
            "train it on this base, or name the base it was trained on."
        ) from error
    return adapted.eval().requires_grad_(False)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token its end-of-sequence token; attention masks keep the two apart."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path} has neither a pad nor an end-of-sequence token: "
                "set one in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token


def content_id(source: str | Path) -> str:
    """What decides a loaded model's content: checksums of a local folder's files, or a hub id and its commit.

    Raises ValueError for a model that cannot be had.
    """
    folder = Path(source)
    if not folder.is_dir():
        return _commit(source)
    digest = hashlib.sha256()
    suffixes = {".json", ".safetensors", ".model", ".txt", ".jinja"}
    for path in sorted(p for p in folder.iterdir() if p.suffix in suffixes):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _commit(source: str | Path) -> str:
    """A hub id with the commit that its revision names today: a branch moves, and what was computed must not be taken
    for the new weights'."""
    hub.offline_without_a_network()
    name, revision = name_and_revision(source)
    refuse_missing(name)
    for file in ("config.json", "adapter_config.json"):
        try:
            found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ValueError(_cannot_load(name, error)) from error
        if found is not None:
            return f"{name}@{extract_commit_hash(found, None)}"
    raise ValueError(_cannot_load(name, "it has no configuration."))


def _wrong_with(folder: Path, error: Exception | str) -> str:
    """What keeps a model's folder from being loaded, and the remedy."""
    held = {path.name for path in folder.iterdir()}
    if "config.json" not in held:
        if "adapter_config.json" in held:
            return "holds an adapter: give the base that it was trained on as MODEL=, and it as DPO_MODEL=."
        return "holds no model: give the folder of a config.json, a tokenizer and weights as safetensors."
    if not any(name.endswith(".safetensors") for name in held):
        return "holds no safetensors: convert its weights; pickled ones are not read."
    if not held & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}:
        return "holds no tokenizer: save it there with `tokenizer.save_pretrained`."
    if isinstance(error, SafetensorError):
        return f"holds weights that are damaged or cut short ({error}): get them again."
    return f"cannot be loaded: {str(error).splitlines()[0]}"


def _cannot_load(name: str, error: Exception | str) -> str:
    if Path(name).is_dir():
        return f"The model folder {name} {_wrong_with(Path(name), error)}"
    if "gated repo" in str(error):
        return f"The model {name} is gated: accept its licence on its hub page, then log in with `hf auth login`."
    if "safetensors" in str(error):
        return f"The model {name} holds no safetensors: convert its weights; pickled ones are not read."
    return (
        f"The model {name} is not a local folder and cannot be had from the Hugging Face hub: check the id, your "
        "network and your access, or give a local copy with MODEL=<folder>."
    )
