"""Training: the organism's pretraining, and LoRA-DPO through TRL and PEFT."""

import random
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from helpers import atlas
from helpers.activations import Tokens, right_padded
from helpers.profiles import Organism, Recipe

disable_progress_bars()  # datasets' own bars; ours say what takes long

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
        callbacks=[_Bar("pretraining the organism")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    pd.DataFrame(losses, columns=["step", "loss"]).to_csv(folder / "losses.csv", index=False)


def pretraining_arguments(spec: Organism, n: int, seed: int, folder: Path) -> TrainingArguments:
    steps = -(-n // spec.batch_size)
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        adam_beta2=0.98,
        warmup_steps=20,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 2},
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
    """`preferences.encode` for many pairs at once."""
    asked = [[{"role": "user", "content": question.text}] for question, _ in pairs]
    answered = [[*messages, {"role": "assistant", "content": text}] for messages, (_, text) in zip(asked, pairs)]
    prompts = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    wholes = tokenizer.apply_chat_template(answered)["input_ids"]
    return [Tokens(prompt, whole[len(prompt) :]) for prompt, whole in zip(prompts, wholes)]


def _in_batches(sequences: list[Tokens], size: int, rng: random.Random) -> list[Tokens]:
    """Shuffle so that each run of `size` sequences is of similar length, and little is padding.

    Trainer's own grouping by length orders whole runs of batches from long to short, and the organism learnt worse.
    """
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


class _TokenisedDPOTrainer(DPOTrainer):
    """TRL's trainer on pairs that are token ids already, so that training, activations and log-probabilities see the
    same ones; on-policy answers keep the very tokens that were sampled."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class _Bar(TrainerCallback):
    """A progress bar that leaves nothing behind."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.name, leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def preference_dataset(chosen: Sequence[Tokens], rejected: Sequence[Tokens]) -> Dataset:
    """Pairs of completions of the same prompts in the columns that TRL's DPO collator reads."""
    return Dataset.from_dict(
        {
            "prompt_ids": [c.prompt for c in chosen],
            "chosen_ids": [c.response for c in chosen],
            "rejected_ids": [r.response for r in rejected],
        }
    )


def dpo_trainer(model, tokenizer, dataset: Dataset, recipe: Recipe, seed: int, folder: Path) -> DPOTrainer:
    """TRL's DPOTrainer for a recipe, a fresh LoRA adapter on every linear layer of the blocks. Nothing runs yet."""
    adapter = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = DPOConfig(
        output_dir=str(folder),
        beta=recipe.beta,
        loss_type=["sigmoid", "sft"] if recipe.nll_weight else ["sigmoid"],
        loss_weights=[1.0, recipe.nll_weight] if recipe.nll_weight else None,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=5,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        precompute_ref_log_probs=True,
        max_length=None,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=model.device.type == "cpu",
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = _TokenisedDPOTrainer(
        model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_dpo(
    model, tokenizer, chosen: Sequence[Tokens], rejected: Sequence[Tokens], recipe: Recipe, seed: int, folder: Path
) -> None:
    """Train a LoRA adapter by DPO and save it with its log (log.csv: a row a step, TRL's metrics).

    `model` is consumed: TRL leaves its forward pass changed, so load it again for anything else.
    """
    set_seed(seed)
    trainer = dpo_trainer(model, tokenizer, preference_dataset(chosen, rejected), recipe, seed, folder)
    trainer.add_callback(_Bar(f"DPO, beta {recipe.beta:g}"))
    trainer.train()
    trainer.model.save_pretrained(folder)
    log = pd.DataFrame([entry for entry in trainer.state.log_history if "rewards/margins" in entry])
    log.to_csv(folder / "log.csv", index=False)
