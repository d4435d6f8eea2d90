"""What is timed: ours and others' ways to the same states, answers, likelihoods and partners.

Each factory prepares what a user prepares once (a wrapped model, a tokenizer) and returns the call that is timed. Ours
multiply as a model in its role does (`products.fast`) and take all prompts at once. The others multiply as torch does
by itself and read the prompts in arrival order, `BATCH` at a time, as their users do.
"""

import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nnsight
import pandas as pd
import torch
from datasets import Dataset
from nnsight import TransformersModel
from peft import LoraConfig
from repeng.extract import batched_get_hiddens
from torch import Tensor
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.subject import LAYERS, VOCABULARY, Subject, random_llama, tokenizer
from helpers.lm import (
    activations,
    architecture,
    batches,
    decoding,
    likelihoods,
    products,
    shared_prompts,
    tilts,
    training,
)
from helpers.lm.recipe import Recipe

BATCH = 16
SITE = f"resid[{LAYERS // 2}]"
DOSES = tuple(dose / 4 for dose in range(-7, 9))
GENERATE_PROMPTS, SWEEP_PROMPTS = 16, 4
NEW_TOKENS = 24
ARMS, ANSWERS = 32, 8  # whose likelihoods are computed, and the prompts whose second halves stand for answers
RECIPE = Recipe(batch_size=16, epochs=2, rank=8, beta=0.1, learning_rate=1e-4)
COMMON, OWN, ANSWER = 24, 14, 21  # tokens of a training prompt that all have, its own, and an answer's, as SmolLM2's
END = "1"  # ends a training answer

Call = Callable[[], Tensor]


def ours(s: Subject) -> Call:
    """helpers.lm.activations at all L + 2 sites: (N, L + 2, d)."""
    sites = architecture.sites(s.model)
    sequences = [batches.Tokens(prompt) for prompt in s.prompts]

    def call() -> Tensor:
        with products.fast(s.model):
            states = activations.hidden_states(s.model, sequences, sites)
        return torch.stack([states[site, "prompt_last"] for site in sites], dim=1)

    return call


def plain(s: Subject) -> Call:
    """A forward pass with logits, right-padded, without a KV cache; it keeps the last token's logits (N, vocabulary).
    It reads no hidden state: what it takes is a lower bound for reading them in arrival order."""

    @torch.no_grad()
    def call() -> Tensor:
        kept = []
        for batch in chunks(s.prompts):
            inputs, attended = batches.right_padded(batch)
            logits = s.model(input_ids=inputs, attention_mask=attended, use_cache=False).logits
            kept.append(logits[torch.arange(len(batch)), attended.sum(dim=1) - 1])
        return torch.cat(kept)

    return call


def repeng(s: Subject) -> Call:
    """repeng's own extraction, which `ControlVector.train` calls, at all of its layers: (N, L, d).
    Its layers are the entries of transformers' `hidden_states`: resid[1] to resid[L - 1] and, as the last, `final`. It
    reads two sites fewer than ours, for it has no name for resid[0] and none for the last block's own output."""
    tokens = tokenizer()
    layers = list(range(LAYERS))

    def call() -> Tensor:
        states = batched_get_hiddens(s.model, tokens, s.texts, layers, batch_size=BATCH)
        return torch.stack([torch.from_numpy(states[layer]) for layer in layers], dim=1)

    return call


def nnsight_trace(s: Subject, stopped: bool) -> Call:
    """nnsight's trace of a list of prompts, as its README shows: all L + 2 sites at the last token, (N, L + 2, d).
    Its `TransformersModel` (`LanguageModel` is the deprecated name) pads on the left, so the last token is at -1. The
    forward pass runs to its end, as in the README's examples, or is `stopped` before the unembedding, at its best."""
    model = TransformersModel(s.model, tokenizer=tokenizer(), task="text-generation")

    @torch.no_grad()
    def call() -> Tensor:
        kept = []
        for batch in chunks(s.texts):
            with model.trace(batch) as tracer:
                rows = nnsight.save([])
                rows.append(model.model.layers[0].input[:, -1])
                for block in model.model.layers:
                    rows.append(block.output[:, -1])
                rows.append(model.model.norm.output[:, -1])
                if stopped:
                    tracer.stop()
            kept.append(torch.stack(list(rows), dim=1))
        return torch.cat(kept)

    return call


def generate(s: Subject, site: str, deltas: Tensor | None, n_prompts: int) -> Call:
    """Greedy answers to the first prompts: (arms, n_prompts, NEW_TOKENS) ids; deltas: (arms, d), None for no hook."""
    tokens, prompts, at = tokenizer(), s.prompts[:n_prompts], None if deltas is None else site

    def call() -> Tensor:
        with products.fast(s.model):
            return torch.tensor(decoding.sample(s.model, tokens, prompts, NEW_TOKENS, None, at, deltas))

    return call


def generate_in_runs(s: Subject, site: str, deltas: Tensor) -> Call:
    """The same by transformers' own `generate`, a run a dose, with a hook that adds it where tokens are predicted."""
    prompts = tokenizer()(s.texts[:SWEEP_PROMPTS], padding=True, padding_side="left", return_tensors="pt")

    def call() -> Tensor:
        runs = []
        for delta in deltas:
            with activations.hooked(s.model, site, partial(_last_moved, delta)):
                runs.append(s.model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False))
        return torch.stack(runs)[:, :, -NEW_TOKENS:]

    return call


def _last_moved(delta: Tensor, states: Tensor) -> Tensor:
    return torch.cat([states[:, :-1], states[:, -1:] + delta], dim=1)


def doses(s: Subject, site: str) -> Tensor:
    """What the sweep adds at a site: DOSES times a random direction as long as the states there are, (doses, d)."""
    states = activations.hidden_states(s.model, [batches.Tokens(p) for p in s.prompts[:BATCH]], [site])
    length = states[site, "prompt_last"].norm(dim=1).mean()
    direction = torch.randn(states[site, "prompt_last"].shape[1], generator=torch.Generator().manual_seed(0))
    return torch.tensor(DOSES)[:, None] * direction / direction.norm() * length


def chunks(rows: list) -> list[list]:
    """The rows in arrival order, BATCH at a time."""
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def likelihoods_of_arms(s: Subject, by_algebra: bool) -> Call:
    """Log-ratios of ANSWERS pairs, and KL(goal || model + v) summed over each chosen answer, with ARMS vectors at
    `final`: (2, ARMS, ANSWERS). By one product of matrices for all (helpers.lm.tilts), or by a run each. The goal is
    the model with a vector more."""
    halves = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in s.prompts[:ANSWERS]]
    chosen, rejected = ([batches.Tokens(half, other[::way]) for half, other in halves] for way in (1, -1))
    W, generator = architecture.unembedding(s.model).weight, torch.Generator().manual_seed(0)
    *vectors, own = torch.randn(ARMS + 1, W.shape[1], generator=generator)
    deltas = torch.stack(vectors)
    goal = [log_p.add(W @ own).log_softmax(-1) for log_p in likelihoods.response_distributions(s.model, chosen)]

    def algebra() -> Tensor:
        with products.fast(s.model):
            told = [torch.from_numpy(shared_prompts.answer_logps(s.model, a, deltas)) for a in (chosen, rejected)]
            base = likelihoods.response_distributions(s.model, chosen)
        kl = torch.stack([tilts.kl_to_goal(q, p, W @ deltas.T).sum(1) for q, p in zip(base, goal)], dim=1)
        return torch.stack([told[0] - told[1], kl])

    def runs() -> Tensor:
        return torch.stack([run(delta) for delta in deltas], dim=1).double()

    @torch.no_grad()
    def run(delta: Tensor) -> Tensor:
        with activations.hooked(s.model, "final", lambda states: states + delta):
            found = [one for batch in chunks([*chosen, *rejected]) for one in _distributions(s, batch)]
        told = [q.gather(1, torch.tensor(a.response)[:, None]).sum() for q, a in zip(found, [*chosen, *rejected])]
        kl = [(p.exp() * (p - q)).sum() for p, q in zip(goal, found)]
        return torch.stack([torch.stack(told[:ANSWERS]) - torch.stack(told[ANSWERS:]), torch.stack(kl)])

    return algebra if by_algebra else runs


def _distributions(s: Subject, batch: list[batches.Tokens]) -> list[Tensor]:
    """The next-token log-probabilities at every response token of a batch, as a plain forward pass gives them."""
    inputs, attended = batches.right_padded([one.ids for one in batch])
    logits = s.model(input_ids=inputs, attention_mask=attended, use_cache=False).logits
    return [row[len(one.prompt) - 1 : len(one.ids) - 1].log_softmax(-1) for row, one in zip(logits, batch)]


# --- Training: two steps on the same sixteen pairs; a call returns each step's loss ---


def training_texts() -> list[dict[str, str]]:
    """A batch of pairs, as texts: prompts with a common beginning, as a chat template gives them one."""
    rng = random.Random(1)

    def words(n: int) -> str:
        return " ".join(str(rng.randrange(2, VOCABULARY)) for _ in range(n))

    common = words(COMMON)
    answers = [
        {name: f" {words(ANSWER - 1)} {END}" for name in ("chosen", "rejected")} for _ in range(RECIPE.batch_size)
    ]
    return [{"prompt": f"{common} {words(OWN)}"} | both for both in answers]


def training_by_ours() -> Call:
    """helpers.lm.training, the base's log-probabilities of the pairs included, which many partners share."""
    columns = {name: [row[name] for row in training_texts()] for name in ("prompt", "chosen", "rejected")}
    ids = {name: tokenizer(END)(texts)["input_ids"] for name, texts in columns.items()}
    chosen, rejected = (list(map(batches.Tokens, ids["prompt"], ids[name])) for name in ("chosen", "rejected"))

    def call() -> Tensor:
        model = random_llama()
        with products.fast(model):
            pairs = training.training_pairs(model, chosen, rejected)
        at_once = training.fastest(model, pairs, RECIPE.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            training.train(model, tokenizer(END), pairs, RECIPE, 0, Path(folder), at_once)
            return torch.tensor(pd.read_csv(Path(folder) / "log.csv")["loss"])

    return call


def training_by_trl() -> Call:
    """TRL's DPOTrainer with PEFT, as its documentation sets it up, but in float32 and without activation checkpointing,
    as ours."""
    texts = training_texts()
    adapter = LoraConfig(r=RECIPE.rank, lora_alpha=2 * RECIPE.rank, target_modules="all-linear", task_type="CAUSAL_LM")

    def call() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                output_dir=folder, beta=RECIPE.beta, learning_rate=RECIPE.learning_rate, lr_scheduler_type="constant",
                per_device_train_batch_size=RECIPE.batch_size, num_train_epochs=RECIPE.epochs, bf16=False,
                activation_checkpointing=False, use_cpu=True, seed=0, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True,
            )  # fmt: skip
            trainer = DPOTrainer(
                random_llama(), args=arguments, train_dataset=Dataset.from_list(texts),
                processing_class=tokenizer(END), peft_config=adapter,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).double()

    return call
