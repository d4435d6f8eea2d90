"""Pretraining the embedded organism: a tokenizer and a small Llama from scratch on the atlas's corpus.

What this module imports decides the organism's key, and that every later one: it imports no training of partners.
"""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import pandas as pd
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from helpers.lm.batches import Tokens, right_padded
from helpers.lm.progress import ProgressBar
from helpers.world import atlas
from helpers.world.organism import Organism

SPECIAL_TOKENS = ("<|pad|>", "<|start|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ '<|start|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 128
IGNORED = -100  # a label that the loss skips


def build_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a chat template; special tokens get the ids 0 to 4."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    pad, start, _, _, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=start, eos_token=end, chat_template=CHAT_TEMPLATE
    )


def build_model(spec: Organism, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the organism's size with random weights; input and output embeddings are untied, as in Llama 2."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=spec.width * 5 // 2,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.width // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(spec: Organism, seed: int, folder: Path) -> None:
    """Train the organism on its corpus, one pass, and save it with its tokenizer and its loss curve (losses.csv)."""
    set_seed(seed)
    pairs = atlas.corpus(atlas.Atlas(spec.places, seed), spec.corpus, seed)
    tokenizer = build_tokenizer([f"{question.text} {text}" for question, text in pairs[:8000]], spec.vocabulary)
    sequences = _in_batches(_encode_all(tokenizer, pairs), spec.batch_size, random.Random(seed))
    trainer = Trainer(
        model=build_model(spec, tokenizer),
        args=pretraining_arguments(spec, len(pairs), seed, folder),
        train_dataset=Dataset.from_dict(
            {"prompt_length": [len(s.prompt) for s in sequences], "input_ids": [s.ids for s in sequences]}
        ),
        data_collator=_answer_labels,
        compute_loss_func=partial(_loss, tokens_per_batch=spec.batch_size * mean(len(s.response) for s in sequences)),
        callbacks=[ProgressBar("pretraining the organism")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    pd.DataFrame(losses, columns=["step", "loss"]).to_csv(folder / "losses.csv", index=False)


def pretraining_arguments(spec: Organism, n: int, seed: int, folder: Path) -> TrainingArguments:
    """Trainer's arguments for one pass over n pairs."""
    steps = -(-n // spec.batch_size)
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        adam_beta2=0.98,
        warmup_steps=20,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(0.85 * steps)},
        train_sampling_strategy="sequential",  # see _in_batches
        remove_unused_columns=False,
        use_cpu=True,
        seed=seed,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _encode_all(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[atlas.Question, str]]) -> list[Tokens]:
    """`encoding.encode` for many pairs at once."""
    asked = [[{"role": "user", "content": question.text}] for question, _ in pairs]
    answered = [[*messages, {"role": "assistant", "content": text}] for messages, (_, text) in zip(asked, pairs)]
    prompts = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    wholes = tokenizer.apply_chat_template(answered)["input_ids"]
    return [Tokens(prompt, whole[len(prompt) :]) for prompt, whole in zip(prompts, wholes)]


def _in_batches(sequences: list[Tokens], size: int, rng: random.Random) -> list[Tokens]:
    """Shuffle so that each run of `size` sequences is of similar length, and little is padding.
    Trainer's own grouping by length orders whole runs of batches from long to short, and the organism learnt worse."""
    shuffled = rng.sample(sequences, len(sequences))
    batches = []
    for i in range(0, len(shuffled), 8 * size):
        pool = sorted(shuffled[i : i + 8 * size], key=lambda s: len(s.ids))
        batches += [pool[j : j + size] for j in range(0, len(pool), size)]
    *full, last = batches
    return [sequence for batch in [*rng.sample(full, len(full)), last] for sequence in batch]


def _answer_labels(batch: list[dict]) -> dict[str, Tensor]:
    """Right-padded inputs, (batch, tokens), and labels that ignore prompts and padding: the loss is on answers only."""
    inputs, attended = right_padded([row["input_ids"] for row in batch])
    prompt = torch.arange(inputs.shape[1])[None] < torch.tensor([row["prompt_length"] for row in batch])[:, None]
    return {"input_ids": inputs, "labels": inputs.masked_fill(prompt | (attended == 0), IGNORED)}


def _loss(outputs, labels: Tensor, num_items_in_batch=None, *, tokens_per_batch: float) -> Tensor:
    """Cross-entropy summed over a batch's answer tokens, over the mean number of those in a batch.
    A mean over the batch's own tokens would weigh each of them more in batches of short answers, and the organism would
    learn to answer short: more often in a plain tone than the corpus does."""
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    summed = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return summed / tokens_per_batch
