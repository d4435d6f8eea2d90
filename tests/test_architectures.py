"""Checkpoints of every architecture, saved and loaded by path, are studied in the smoke profile.

What a study finds is held against forward passes by transformers and PEFT alone.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, recorded, tiny
from peft import PeftModel
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpers import study
from helpers.stages import artifacts

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
ONE_FOR_ALL = {"bos_token": END, "eos_token": END, "unk_token": END}  # GPT-2's, and no padding
TOKENS = {  # as the families have them; `first`: what a tokenizer begins with, `chat`: whether it has a template
    "llama": {"bos_token": START, "eos_token": END, "first": START},
    "qwen2": {"eos_token": END, "pad_token": PAD, "chat": True},
    "qwen3": {"eos_token": END, "pad_token": PAD, "chat": True},
    "mistral": {"bos_token": START, "eos_token": END, "first": START, "chat": True},
    "gemma": {"bos_token": START, "eos_token": END, "pad_token": PAD, "first": START, "chat": True},
    "gpt2": ONE_FOR_ALL,
    "gpt_neox": ONE_FOR_ALL,
    "opt": {"bos_token": END, "eos_token": END, "pad_token": PAD, "first": END},
    "phi": ONE_FOR_ALL,
    "falcon": {"eos_token": END},
    "bloom": {"bos_token": START, "eos_token": END, "pad_token": PAD},
}
WITH_MESSAGES = {"llama", "qwen3", "gemma", "falcon"}  # with and without a chat template


def family_tokenizer(model_type: str, tokenizer) -> PreTrainedTokenizerFast:
    """The tokens of `tokenizer` with the special ones that a family has, and a chat template where it has one."""
    special = dict(TOKENS[model_type])
    first, chat = special.pop("first", None), special.pop("chat", False)
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    if first:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))]
        )
    template = tokenizer.chat_template if chat else None
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def row(i: int, as_messages: bool) -> dict:
    """A preference row; the answers begin with words of their own."""
    asked, chosen, rejected = f"Where is town {i}?", f" In the north, {i} miles.", f" No idea of {i}."
    if not as_messages:
        return {"prompt": asked, "chosen": chosen, "rejected": rejected}
    turns = [("user", f"Hi {i}."), ("assistant", "Hi."), ("user", asked)]
    answers = {"chosen": [("assistant", chosen.strip())], "rejected": [("assistant", rejected.strip())]}
    return {
        column: [{"role": role, "content": content} for role, content in said]
        for column, said in ({"prompt": turns} | answers).items()
    }


def write_inputs(folder: Path, model_type: str, tokenizer) -> None:
    """A checkpoint in `model` and preference data in `pairs.jsonl`."""
    unused = 7  # embeddings without a token, as many checkpoints have them
    context = {"max_position_embeddings": 128} if model_type in WITH_MESSAGES else {}
    tiny(model_type, vocab_size=len(tokenizer) + unused, **context).save_pretrained(folder / "model")
    family_tokenizer(model_type, tokenizer).save_pretrained(folder / "model")
    rows = [row(i, model_type in WITH_MESSAGES) for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture(params=TOKENS)
def model_type(request) -> str:
    return request.param


@pytest.fixture
def folder(model_type, shared, tokenizer, monkeypatch) -> Path:
    """Where an architecture has been studied."""

    def make(folder: Path) -> None:
        write_inputs(folder, model_type, tokenizer)
        monkeypatch.setenv("DSTEER_ARTIFACTS", str(folder / "artifacts"))
        computed(opened(folder))

    found = shared(f"studied-{model_type}", make)
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(found / "artifacts"))
    return found


def opened(folder: Path) -> study.Study:
    return study.load("smoke", str(folder / "model"), str(folder / "pairs.jsonl"))


def computed(made: study.Study) -> None:
    """What 02 to 05 ask a study for, as far as it depends on the model."""
    v = made.direction()
    deltas = torch.stack([0 * v, v])
    made.chosen.measured, made.states("heldout"), made.token_vector(), made.reward_margins("heldout")
    made.sweep("base", "resid[2]", made.direction("resid[2]")[None])
    for role, sign in (("base", 1), ("dpo", -1)):
        made.answers(role, "heldout"), made.sweep(role, "final", sign * deltas)
        made.divergences(role, sign * deltas), made.log_ratios(role, sign * deltas)


@pytest.fixture
def made(folder):
    """The study, computed. Nothing more is computed here."""
    with artifacts.nothing_made():
        yield opened(folder)


@pytest.fixture
def plain(made):
    """The base and the DPO model by transformers and PEFT alone, in float64."""
    base, other = (AutoModelForCausalLM.from_pretrained(made.source.path, dtype=torch.float64) for _ in range(2))
    dpo = PeftModel.from_pretrained(other, made.chosen.adapter.path).get_base_model()
    return {"base": base.eval(), "dpo": dpo.double().eval()}


def prompt_ids(tokenizer, pair) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer(pair.prompt)["input_ids"]
    turns = pair.messages or [("user", pair.prompt)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def prompts(made, split: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(made.source.path)
    return [prompt_ids(tokenizer, pair) for pair in made.pairs[split]]


@torch.no_grad()
def mean_state(model, model_type: str, sequences: list[list[int]], site: str) -> torch.Tensor:
    """The mean over sequences, read one at a time, of the last token's state."""
    states = []
    with recorded(model, ARCHITECTURES[model_type][1]) as found:
        for ids in sequences:
            model(input_ids=torch.tensor([ids]), use_cache=False)
            states.append(found[site][0, -1])
    return torch.stack(states).mean(0)


def test_v_star_is_the_mean_displacement_that_plain_forward_passes_give(made, plain, model_type):
    heldin = prompts(made, "heldin")
    for site in ("resid[1]", "final"):
        base, dpo = (mean_state(plain[role], model_type, heldin, site) for role in ("base", "dpo"))
        v = made.direction(site)
        assert v.norm() > 1e-3 * base.norm()
        torch.testing.assert_close(v.double(), dpo - base, atol=1e-3 * v.norm().item(), rtol=0)


def test_dpo_moves_the_states_after_every_block_and_not_one_bit_of_the_embeddings(made):
    moved = {site: made.displacements("heldin", site).abs().amax(dim=1) for site in made.lm.sites}
    assert not moved.pop("resid[0]").any()
    assert all(rows.all() for rows in moved.values())


@torch.no_grad()
def kl_to_dpo(made, plain, shift: torch.Tensor) -> float:
    """KL(DPO || base with `shift` on its logits), summed over each answer of the DPO model and its end; their mean."""
    end, total = made.lm.tokenizer.eos_token_id, 0.0
    for prompt, answer in zip(prompts(made, "heldout"), made.answers("dpo", "heldout")["ids"]):
        is_cut = len(answer) == made.profile.sizes.new_tokens
        ids = torch.tensor([prompt + answer + ([] if is_cut else [end])])
        p, q = (plain[role](input_ids=ids).logits[0, len(prompt) - 1 : -1] for role in ("dpo", "base"))
        p, q = p.log_softmax(-1), (q + shift).log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
    return total / len(made.pairs["heldout"])


def test_dose_0_is_the_base_and_dose_1_adds_v_star(made, plain):
    v = made.direction()
    deltas = torch.stack([0 * v, v])
    found = made.divergences("base", deltas).groupby("arm")["kl"].mean().tolist()
    bias = plain["base"].get_output_embeddings().weight @ v.double()
    assert found == pytest.approx([kl_to_dpo(made, plain, dose * bias) for dose in (0, 1)], rel=1e-3)
    base, swept = made.answers("base", "heldout"), made.sweep("base", "final", deltas)
    assert swept[swept["arm"] == 0]["ids"].tolist() == base["ids"].tolist()
    for judgement in ("preferred", "not_opposed", "token_loss"):
        assert swept[swept["arm"] == 0][judgement].tolist() == pytest.approx(base[judgement].tolist(), rel=1e-5)
