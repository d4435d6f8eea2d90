"""TruthfulQA's multiple choice, by log-probabilities."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from scipy.special import logsumexp
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from helpers.data import files, naming
from helpers.data.unavailable import Unavailable
from helpers.lm import encoding, hub, likelihoods, loading
from helpers.lm.batches import Tokens

TRUTHFULQA = "truthfulqa/truthful_qa@741b8276f2d1982aa3d5b832d3ee81ed3b896490"


class Truthfulness(NamedTuple):
    """For each question, (N,) or (arms, N): `mc1`, 1 where the best answer is likelier than every false one, else 0;
    `mc2`, the true answers' share of the probability of all answers."""

    mc1: np.ndarray
    mc2: np.ndarray


def truthfulqa(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], deltas: Tensor | None = None
) -> Truthfulness:
    """MC1 and MC2 of TruthfulQA (Lin et al. 2022, arXiv:2109.07958) by summed log-probabilities of the answers.

    deltas: what each arm adds at `final`, (arms, d): all arms are scored in one pass. Questions are asked as users ask
    the model, by its chat template, or as `Q: ... A: ...` where it has none; published numbers have six examples
    before each question, so compare arms with each other and not with them. Raises ValueError for a row without true
    and false answers.
    """
    targets = [[_targets(i, row, name) for name in ("mc1_targets", "mc2_targets")] for i, row in enumerate(rows)]
    asked = [(row["question"], answer) for row, (first, second) in zip(rows, targets) for answer in first | second]
    sequences = [_encoded(tokenizer, question, answer) for question, answer in asked]
    logps = dict(zip(asked, likelihoods.response_logps(model, sequences, deltas, "TruthfulQA").T))
    found = [_mc1_mc2(row["question"], *both, logps) for row, both in zip(rows, targets)]
    mc1, mc2 = (np.stack(one, axis=-1) for one in zip(*found))
    return Truthfulness(mc1, mc2)


def _mc1_mc2(question: str, first: dict, second: dict, logps: dict) -> tuple[np.ndarray, np.ndarray]:
    def scored(targets: dict[str, bool], truth: bool) -> np.ndarray:
        return np.stack([logps[question, answer] for answer, true in targets.items() if true == truth])

    mc1 = scored(first, True)[0] > scored(first, False).max(axis=0)
    # of logarithms: the probabilities themselves are too small for floats where answers are long
    true, false = (logsumexp(scored(second, truth), axis=0) for truth in (True, False))
    return mc1.astype(float), np.exp(true - np.logaddexp(true, false))


def _encoded(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Tokens:
    if tokenizer.chat_template is not None:
        return encoding.encode(tokenizer, question, answer)
    asked, said = encoding.encode(tokenizer, f"Q: {question}\nA:", f" {answer}")
    return Tokens(asked, said[:-1] if tokenizer.eos_token_id is not None else said)  # no end: another Q: may follow


def _targets(index: int, row: dict, name: str) -> dict[str, bool]:
    """The answers of MC1 or of MC2, each with whether it is true. Both forms there are of the data are read: the hub's
    lists of choices and labels, and the authors' mc_task.json, where an answer names its label."""
    told = row[name]
    answers = dict(zip(told["choices"], told["labels"])) if "choices" in told else told
    targets = {str(answer): bool(label) for answer, label in answers.items()}
    n_true = sum(targets.values())
    if not 0 < n_true < len(targets) or (name == "mc1_targets" and n_true != 1):
        raise ValueError(
            f"TruthfulQA's row {index} has {n_true} true of {len(targets)} {name}: it needs true and false ones, "
            "and of mc1_targets exactly one that is true."
        )
    return targets


def truthfulqa_rows() -> list[dict]:
    """TruthfulQA's 817 questions: the hub's `truthfulqa/truthful_qa`, or what TRUTHFULQA names, a hub id or a JSON,
    JSONL or parquet file. Raises Unavailable where they cannot be had."""
    source = os.environ.get("TRUTHFULQA") or TRUTHFULQA
    try:
        if naming.is_file(source):
            rows, _ = files.rows_of(Path(source))
        else:
            hub.offline_without_a_network()
            name, revision = loading.name_and_revision(source)
            rows = datasets.load_dataset(name, "multiple_choice", split="validation", revision=revision)
        if not len(rows):
            raise ValueError("It has no rows.")
        return [{name: row[name] for name in ("question", "mc1_targets", "mc2_targets")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"TruthfulQA cannot be read from {source}: connect to the Hugging Face hub, or set TRUTHFULQA to a JSON, "
            "JSONL or parquet file of its multiple_choice rows."
        ) from error
