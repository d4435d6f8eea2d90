"""Sampling answers, for many prompts and many steering doses in one batch.

All arms of a comparison (doses, directions, models) use the same random numbers for the same prompt: adding Gumbel
noise to the logits and taking the maximum samples exactly from the softmax (the Gumbel-max trick), and the noise
depends only on the seed, the prompt's index and the step. Arms then differ by what was done to the model alone, and a
sample does not depend on which others share its batch.
"""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from helpers import activations, encoding, models, steering

MAX_ROWS = 1536  # sequences decoded at once
STRIDE = 6  # tokens decoded before the rows that have ended leave the batch
SPANS = ("response", "prompt", "all")


class GumbelNoise(LogitsProcessor):
    """Add Gumbel noise to the logits, so that the greedy choice is a sample at temperature 1.

    prompts: the index of each row's prompt, (rows,). It may lose rows between steps: rows of one prompt share their
    noise, which is the same whichever other rows there are.
    """

    def __init__(self, prompts: Tensor, seed: int):
        self.prompts = prompts
        self.generators = {i: torch.Generator().manual_seed(seed * 1_000_003 + i) for i in prompts.unique().tolist()}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        present, row = self.prompts.unique(return_inverse=True)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=self.generators[i]) for i in present.tolist()])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7)))
        return scores.float() + gumbel[row].to(scores.device)


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    seed: int | None,
    site: str | None = None,
    deltas: Tensor | None = None,
    span: str = "response",
    progress: str | None = None,
) -> list[list[list[int]]]:
    """Answer every prompt once per arm: [arm][prompt] -> token ids, up to and without what ends an answer
    (`encoding.ends`).

    seed: of the samples; None decodes greedily.
    deltas: what each arm adds at `site` (a dose times a direction), (arms, d), or (arms, prompts, d) where every prompt
    has its own; None is one arm without a hook.
    span: "response" steers every position that predicts a token of the response, so from the prompt's last token on;
    "prompt" the prompt's own positions alone, the last among them; "all" both. Where memory does not suffice, batches
    are halved. Raises ValueError for an empty prompt or one that leaves no room for the answer, and for deltas of
    another shape or of no arm.
    """
    models.check_lengths(model, [len(p) + new_tokens if p else 0 for p in prompts])
    if (site is None) != (deltas is None):
        raise ValueError("To steer give both a site and deltas, and neither otherwise.")
    if span not in SPANS:
        raise ValueError(f"Unknown span {span!r}: choose from {', '.join(SPANS)}.")
    arms = 1 if deltas is None else len(deltas)
    if deltas is not None:
        deltas = steering.by_prompt(deltas, len(prompts))
    answers = [[[]] * len(prompts) for _ in range(arms)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    step = max(1, MAX_ROWS // arms)

    def compute(chunk: list[int]) -> tuple[list[int], list[list[int]]]:
        chosen = [order[i] for i in chunk]
        return chosen, _decode(model, tokenizer, prompts, chosen, arms, new_tokens, seed, site, deltas, span)

    with tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False) as bar:
        for chunk, decoded in activations.shrinking([1] * len(order), step, compute):
            for row, ids in enumerate(decoded):
                answers[row % arms][chunk[row // arms]] = ids
            bar.update(len(chunk))
    return answers


@torch.no_grad()
def _decode(model, tokenizer, prompts, chunk, arms, new_tokens, seed, site, deltas, span) -> list[list[int]]:
    """The answers to a chunk of prompts, a prompt's arms one after the other."""
    ends = encoding.ends(tokenizer)
    inputs, attended = _left_padded([prompts[i] for i in chunk], tokenizer.pad_token_id, model.device)
    width = inputs.shape[1]
    first, stop = {"response": (width - 1, None), "prompt": (0, width), "all": (0, None)}[span]
    settings = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends or None}
    rows = _Rows(
        index=torch.arange(len(chunk) * arms),
        ids=inputs.repeat_interleave(arms, dim=0),
        attended=attended.repeat_interleave(arms, dim=0),
        deltas=None if deltas is None else deltas[:, chunk].transpose(0, 1).flatten(0, 1),
        noise=None if seed is None else GumbelNoise(torch.tensor(chunk).repeat_interleave(arms), seed),
        cache=_shared_cache(model, inputs, attended, arms, settings) if span == "response" else None,
    )
    answers: list[list[int]] = [[]] * len(rows.index)
    while len(rows.index):
        steps = min(STRIDE, width + new_tokens - rows.ids.shape[1])
        with nullcontext() if deltas is None else steering.added(model, site, rows.deltas, first, stop):
            rows.advance(model, steps, settings)
        answered = rows.ids[:, width:].tolist()
        going = torch.tensor([len(ids) < new_tokens and not set(ends) & set(ids) for ids in answered])
        for i in (~going).nonzero().flatten().tolist():
            answers[rows.index[i]] = _until_end(answered[i], ends)
        rows.keep(going)
    return answers


@dataclass
class _Rows:
    """The rows of a batch that have not ended yet."""

    index: Tensor  # of each row in the batch
    ids: Tensor
    attended: Tensor
    deltas: Tensor | None
    noise: GumbelNoise | None
    cache: Cache | None  # keys and values of what has been read

    def advance(self, model: nn.Module, steps: int, settings: dict) -> None:
        """Decode up to `steps` more tokens."""
        out = models.causal_lm(model).generate(
            input_ids=self.ids,
            attention_mask=self.attended,
            past_key_values=self.cache,
            max_new_tokens=steps,
            logits_processor=LogitsProcessorList([self.noise] if self.noise else []),
            return_dict_in_generate=True,
            **settings,
        )
        new = out.sequences.shape[1] - self.ids.shape[1]
        self.ids, self.cache = out.sequences, out.past_key_values
        self.attended = torch.cat([self.attended, self.attended.new_ones(len(self.ids), new)], dim=1)

    def keep(self, chosen: Tensor) -> None:
        """Drop the other rows; chosen: (rows,), true or false."""
        if chosen.all():
            return
        self.index, self.ids, self.attended = self.index[chosen], self.ids[chosen], self.attended[chosen]
        self.deltas = None if self.deltas is None else self.deltas[chosen]
        if self.noise:
            self.noise.prompts = self.noise.prompts[chosen]
        self.cache.batch_select_indices(chosen.nonzero().flatten())


def _shared_cache(model, inputs: Tensor, attended: Tensor, arms: int, settings: dict) -> Cache | None:
    """Keys and values of all but the prompts' last tokens, computed once for all arms: none of them steers these."""
    if not attended[:, :-1].any(dim=1).all():  # a prompt of one token
        return None
    prefix = _Rows(torch.arange(len(inputs)), inputs[:, :-1], attended[:, :-1], None, None, None)
    prefix.advance(model, 1, settings)
    prefix.cache.batch_repeat_interleave(arms)
    return prefix.cache


def _left_padded(ids: Sequence[list[int]], pad: int, device) -> tuple[Tensor, Tensor]:
    width = max(map(len, ids))
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return inputs, attended


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, ids))


def texts(tokenizer: PreTrainedTokenizerBase, answers: Sequence[list[int]]) -> list[str]:
    """The answers as text, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
