"""Training a partner of the base through TRL and PEFT: DPO, and the controls that differ from it in one thing."""

import random
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer

from helpers import models
from helpers.activations import Tokens
from helpers.profiles import Recipe

disable_progress_bars()  # datasets' own bars; ours say what takes long


class _TokenisedDPOTrainer(DPOTrainer):
    """TRL's trainer on pairs that are token ids already, so that training, activations and log-probabilities see the
    same ones; on-policy answers keep the very tokens that were sampled."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class ProgressBar(TrainerCallback):
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
    """Pairs of completions of the same prompts in the columns that TRL's DPO collator reads, from short to long.

    `length`, in tokens, lets the trainer draw batches of similar length: little of them is padding.
    """
    pairs = sorted(zip(chosen, rejected), key=_length)
    return Dataset.from_dict(
        {
            "prompt_ids": [c.prompt for c, _ in pairs],
            "chosen_ids": [c.response for c, _ in pairs],
            "rejected_ids": [r.response for _, r in pairs],
            "length": [_length(pair) for pair in pairs],
        }
    )


def _length(pair: tuple[Tokens, Tokens]) -> int:
    return max(len(tokens.ids) for tokens in pair)


def relabelled(
    chosen: Sequence[Tokens], rejected: Sequence[Tokens], labels: str, seed: int
) -> tuple[list[Tokens], list[Tokens]]:
    """(chosen, rejected) with their labels as they are ("true"), all swapped ("reversed"), or each with probability 1/2
    ("shuffled")."""
    rng = random.Random(seed)
    swap_share = {"true": 0.0, "shuffled": 0.5, "reversed": 1.0}[labels]
    pairs = [(r, c) if rng.random() < swap_share else (c, r) for c, r in zip(chosen, rejected)]
    return [c for c, _ in pairs], [r for _, r in pairs]


def _losses(recipe: Recipe) -> tuple[list[str], list[float]]:
    """TRL's names of the terms of a recipe's loss, and their weights."""
    if recipe.objective == "sft":
        return ["sft"], [recipe.nll_weight or 1.0]
    return (["sigmoid", "sft"], [1.0, recipe.nll_weight]) if recipe.nll_weight else (["sigmoid"], [1.0])


def dpo_trainer(model, tokenizer, dataset: Dataset, recipe: Recipe, seed: int, folder: Path) -> DPOTrainer:
    """TRL's DPOTrainer for a recipe, with a fresh LoRA adapter on every linear layer of the blocks; at rank 0 it trains
    the blocks' own weights. Embeddings and unembedding stay frozen, as in the paper. Nothing runs yet."""
    adapter = None
    if recipe.rank:
        adapter = LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    else:
        models.blocks(model).requires_grad_(True)
    losses, weights = _losses(recipe)
    arguments = DPOConfig(
        output_dir=str(folder),
        beta=recipe.beta,
        loss_type=losses,
        loss_weights=weights,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=5,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,  # `length` among them, which the sampler reads
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


def train(
    model, tokenizer, chosen: Sequence[Tokens], rejected: Sequence[Tokens], recipe: Recipe, seed: int, folder: Path
) -> None:
    """Train by a recipe and save the adapter (at rank 0 the whole model and its tokenizer) with its log.

    log.csv has a row a step of TRL's metrics. `model` is consumed: TRL leaves its forward pass changed, so load it
    again for anything else.
    """
    seed += recipe.seed
    set_seed(seed)
    dataset = preference_dataset(*relabelled(chosen, rejected, recipe.labels, seed))
    trainer = dpo_trainer(model, tokenizer, dataset, recipe, seed, folder)
    trainer.add_callback(ProgressBar(f"{recipe.objective.upper()}, beta {recipe.beta:g}"))
    trainer.train()
    trainer.model.save_pretrained(folder)
    if not recipe.rank:
        tokenizer.save_pretrained(folder)
    log = pd.DataFrame([entry for entry in trainer.state.log_history if "rewards/margins" in entry])
    log.to_csv(folder / "log.csv", index=False)
