"""What is measured on: a Llama as large as SmolLM2-135M, its weights random, a tokenizer whose words are token ids, and
prompts of mixed length."""

import math
import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 49_152
LAYERS = 30
WIDTH = 576
HEADS = 9
N_PROMPTS = 128
LENGTHS = (8, 64)  # tokens, log-uniform: many short prompts, few long ones
SEED = 0
PAD = 0


@dataclass(frozen=True)
class Subject:
    """The model and its prompts as token ids and as the text that is tokenised back to them."""

    model: LlamaForCausalLM
    prompts: list[list[int]]
    texts: list[str]


def subject() -> Subject:
    """The same model and prompts at every call. Raises ValueError unless the texts are tokenised to the prompts."""
    prompts = random_prompts()
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    if tokenizer()(texts)["input_ids"] != prompts:
        raise ValueError("The tokenizer does not give the prompts' token ids back: the contenders would see others.")
    return Subject(random_llama(), prompts, texts)


def random_llama() -> LlamaForCausalLM:
    """A Llama of 135 million random weights, in float32, for evaluation; no token ends a sequence."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=512,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig()
    return model.eval().requires_grad_(False)


def random_prompts() -> list[list[int]]:
    """Prompts of random ids, none of them the pad id, in random order of length."""
    rng = random.Random(SEED)
    lengths = [round(math.exp(rng.uniform(*map(math.log, LENGTHS)))) for _ in range(N_PROMPTS)]
    return [[rng.randrange(PAD + 1, VOCABULARY) for _ in range(length)] for length in lengths]


def tokenizer(end: str | None = None) -> PreTrainedTokenizerFast:
    """A new tokenizer (contenders change its padding side) that reads the word "17" as the token id 17. end: the word
    that ends an answer, if one does."""
    words = {"<pad>": PAD} | {str(i): i for i in range(PAD + 1, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    read = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token=end, padding_side="right", model_input_names=read
    )
