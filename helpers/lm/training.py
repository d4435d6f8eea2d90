"""Training a partner of the base through TRL and PEFT: DPO, and the controls that differ from it in one thing."""

import json
import random
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from accelerate.utils import find_executable_batch_size, release_memory
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedConfig, PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer

from helpers.lm import architecture, likelihoods, products, shared_prompts
from helpers.lm.batches import Tokens
from helpers.lm.progress import ProgressBar
from helpers.lm.recipe import STOPS, Recipe, step_of

# Models whose kernels take the weights of this map past any adapter on it.
FUSED = ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h", "zamba2")
TOKENS_AT_ONCE = 512
LONGEST = 1024  # tokens of a pair, whose attention there is memory for as a matrix in every block
disable_progress_bars()  # datasets' own bars; ours say what takes long


class TrainingPair(NamedTuple):
    """A chosen and a rejected answer to one prompt, and the base's log-probabilities of the two, in nats."""

    chosen: Tokens
    rejected: Tokens
    base_logps: tuple[float, float]

    @property
    def swapped(self) -> "TrainingPair":
        return TrainingPair(self.rejected, self.chosen, self.base_logps[::-1])

    @property
    def length(self) -> int:
        """Of the longer of its two sequences, in tokens."""
        return max(len(self.chosen.ids), len(self.rejected.ids))


def training_pairs(model, chosen: Sequence[Tokens], rejected: Sequence[Tokens]) -> list[TrainingPair]:
    """The pairs that a partner of `model`, its base, is trained on."""
    logps = [
        likelihoods.response_logps(model, answers, progress=f"log-probabilities, {name}").tolist()
        for name, answers in (("chosen", chosen), ("rejected", rejected))
    ]
    return list(map(TrainingPair, chosen, rejected, zip(*logps)))


class _Keeping(TrainerCallback):
    """Keeps the adapter at the stops on the way (recipe.STOPS), in a folder each."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.stops = [recipe.replace(stop=stop) for stop in STOPS if stop < 1]
        self.folder = folder

    def on_step_end(self, args, state, control, model, **kwargs):
        for stopped in self.stops:
            if state.is_world_process_zero and state.global_step == step_of(stopped.stop, state.max_steps):
                save_model(model, self.folder / stopped.folder)


class _PreparedDPOTrainer(DPOTrainer):
    """TRL's trainer on pairs that are token ids already, so that training, activations and log-probabilities see the
    same ones (on-policy answers keep the very tokens that were sampled), and that hold the reference's
    log-probabilities, which many partners of one base share."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        return dataset


def preference_dataset(pairs: Sequence[TrainingPair]) -> Dataset:
    """Pairs in the columns that TRL's DPO collator reads, from short to long.

    `length`, in tokens, lets the trainer draw batches of similar length: little of them is padding.
    """
    pairs = sorted(pairs, key=lambda pair: pair.length)
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.chosen.prompt for pair in pairs],
            "chosen_ids": [pair.chosen.response for pair in pairs],
            "rejected_ids": [pair.rejected.response for pair in pairs],
            "ref_chosen_logps": [pair.base_logps[0] for pair in pairs],
            "ref_rejected_logps": [pair.base_logps[1] for pair in pairs],
            "length": [pair.length for pair in pairs],
        }
    )


def relabelled(pairs: Sequence[TrainingPair], labels: str, seed: int) -> list[TrainingPair]:
    """Pairs with their labels as they are ("true"), all swapped ("reversed"), or each with probability 1/2
    ("shuffled")."""
    rng = random.Random(seed)
    swap_share = {"true": 0.0, "shuffled": 0.5, "reversed": 1.0}[labels]
    return [pair.swapped if rng.random() < swap_share else pair for pair in pairs]


def _losses(recipe: Recipe) -> tuple[list[str], list[float]]:
    """TRL's names of the terms of a recipe's loss, and their weights."""
    if recipe.objective == "sft":
        return ["sft"], [recipe.nll_weight or 1.0]
    return (["sigmoid", "sft"], [1.0, recipe.nll_weight]) if recipe.nll_weight else (["sigmoid"], [1.0])


def _mixed_precision(model) -> dict[str, bool]:
    """TRL's flags for a model as it was loaded: on a GPU, one in 16 bits trains under autocast to its own precision."""
    on_gpu = model.device.type == "cuda"
    return {"bf16": on_gpu and model.dtype == torch.bfloat16, "fp16": on_gpu and model.dtype == torch.float16}


def dpo_trainer(
    model, tokenizer, dataset: Dataset, recipe: Recipe, seed: int, folder: Path, at_once: int | None = None
) -> DPOTrainer:
    """TRL's DPOTrainer for a recipe, with a fresh LoRA adapter on every linear layer of the blocks that takes one; at
    rank 0 it trains the blocks' own weights. Embeddings and unembedding stay frozen, as in the paper. Nothing runs yet.

    at_once: how many pairs of a batch all processes together compute at a time, a divisor of the batch's size (which it
    is by default) and a multiple of their number. It decides neither which pairs are in a batch nor how many steps
    there are: gradients accumulate to the whole batch.
    """
    without_dropout(model)
    if not recipe.rank:
        architecture.blocks(model).requires_grad_(True)
    trainer = _PreparedDPOTrainer(
        model,
        args=_arguments(model, recipe, seed, folder, at_once or recipe.batch_size),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=_adapter(model, recipe) if recipe.rank else None,
    )
    trainer.remove_callback(PrinterCallback)
    if not architecture.is_small(model) and shared_prompts.agrees(model, _answers(dataset)):
        shared_prompts.share_prompts(model)
    return trainer


def _answers(dataset: Dataset) -> list[Tokens]:
    """All answers of a preference dataset, with their prompts."""
    answers = (dataset[column][:] for column in ("chosen_ids", "rejected_ids"))
    return [Tokens(*row) for column in answers for row in zip(dataset["prompt_ids"][:], column)]


def without_dropout(model: nn.Module) -> None:
    """Take all dropout out of a model, which TRL takes out of modules of torch alone: some keep its rate, or that at
    which they skip whole blocks, as a number, or read it in their configuration at each pass. The policy of DPO's first
    step is then its reference."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    for holder in (*model.modules(), *(config for config in configs if isinstance(config, PreTrainedConfig))):
        for name, value in vars(holder).items():
            if isinstance(value, float) and "drop" in name:
                setattr(holder, name, 0.0)


def _adapter(model, recipe: Recipe) -> LoraConfig:
    blocks = architecture.blocks(model)
    outside = rf"(?!{re.escape(next(name for name, module in model.named_modules() if module is blocks))}\.).*"
    fused = r"|.*\.out_proj" if model.config.model_type in FUSED else ""
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules="all-linear",
        exclude_modules=outside + fused,
        task_type="CAUSAL_LM",
    )


def _arguments(model, recipe: Recipe, seed: int, folder: Path, at_once: int) -> DPOConfig:
    losses, weights = _losses(recipe)
    return DPOConfig(
        output_dir=str(folder),
        beta=recipe.beta,
        loss_type=losses,
        loss_weights=weights,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=recipe.batch_size // at_once,
        accelerator_config={"split_batches": True},  # between processes, rather than that many for each
        ddp_find_unused_parameters=False,  # every trained weight is used in every step
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,  # `length` among them, which the sampler reads
        precompute_ref_log_probs=True,
        max_length=None,
        activation_checkpointing=False,
        router_aux_loss_coef=0.0,  # of a mixture of experts: it is no part of DPO's loss
        **_mixed_precision(model),
        use_cpu=model.device.type == "cpu",
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def fastest(model, pairs: Sequence[TrainingPair], batch_size: int) -> int:
    """How many pairs of a batch to compute at a time, a divisor of its size: on processors as many of a large model as
    have TOKENS_AT_ONCE tokens, whose states stay near, in a third of the memory; else all."""
    if model.device.type != "cpu" or architecture.is_small(model):
        return batch_size
    most = TOKENS_AT_ONCE // (2 * max(pair.length for pair in pairs))
    return max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= max(most, 1))


def within_memory(attempt: Callable[[int], None], batch_size: int) -> None:
    """Call `attempt(at_once)` with the whole batch and, each time that memory runs out, with its next smaller divisor.

    Not the trainer's own `auto_find_batch_size`, which makes the total batch smaller, and goes on from weights that are
    trained in part. Raises MemoryError where a single pair is too much.
    """
    smaller = (size for size in range(batch_size - 1, 0, -1) if batch_size % size == 0)

    def next_smaller() -> int:
        for size in smaller:
            return size
        raise MemoryError(
            "Training runs out of memory with one pair at a time: take a smaller model, shorter pairs (sizes.longest), "
            'dtype = "bfloat16" or quantize = "4bit".'
        )

    def freed(at_once: int) -> None:
        release_memory()  # what a failed attempt held, which its exception kept alive until now
        attempt(at_once)

    find_executable_batch_size(freed, batch_size, next_smaller)()


def train(
    model,
    tokenizer,
    pairs: Sequence[TrainingPair],
    recipe: Recipe,
    seed: int,
    folder: Path,
    at_once: int | None = None,
) -> None:
    """Train by a recipe to the end of its run and save the adapter, at every stop on the way too (at rank 0 the whole
    model and its tokenizer, at the end alone), with its log.

    pairs: `training_pairs` of this model. log.csv has a row a step of TRL's metrics. `model` is consumed: TRL leaves
    its forward pass changed, so load it again for anything else. at_once: as in `dpo_trainer`.

    Several processes (tools/launch.py) call this together, each with a model of its own and all with one folder, in
    which the main one saves. Their partner starts from the same weights as that of one process and sees the same pairs
    in each step, but it is not the same bit for bit: sums are rounded in another order, the NLL term is the mean of the
    processes' means over tokens, and an incomplete last batch of an epoch is filled with pairs from its beginning. So
    what was other than one process with whole batches is saved as parts.json.
    """
    seed += recipe.seed
    set_seed(seed)
    dataset = preference_dataset(relabelled(pairs, recipe.labels, seed))
    trainer = dpo_trainer(model, tokenizer, dataset, recipe, seed, folder, at_once)
    trainer.add_callback(ProgressBar(f"{recipe.objective.upper()}, beta {recipe.beta:g}"))
    if recipe.rank:
        trainer.add_callback(_Keeping(recipe, folder))
    with products.fast(model) if max(pair.length for pair in pairs) <= LONGEST else nullcontext():
        trainer.train()
    if trainer.is_world_process_zero():
        _save(trainer, tokenizer, recipe, folder)


def save_model(model, folder: Path) -> None:
    """Save an adapter or a whole model with the same bytes wherever it was trained: PEFT writes where the base was, the
    modules in a set's order, and a page to be filled in."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    settings = folder / "adapter_config.json"
    if settings.exists():
        told = json.loads(settings.read_text())
        told |= {"base_model_name_or_path": None, "target_modules": sorted(told["target_modules"])}
        settings.write_text(json.dumps(told, indent=2, sort_keys=True))


def _save(trainer: DPOTrainer, tokenizer, recipe: Recipe, folder: Path) -> None:
    save_model(trainer.model, folder)
    if not recipe.rank:
        tokenizer.save_pretrained(folder)
    log = pd.DataFrame([entry for entry in trainer.state.log_history if "rewards/margins" in entry])
    log.to_csv(folder / "log.csv", index=False)
    parts = {"processes": trainer.args.world_size, "at_once": trainer.args.per_device_train_batch_size}
    if parts != {"processes": 1, "at_once": recipe.batch_size}:
        (folder / "parts.json").write_text(json.dumps(parts))
