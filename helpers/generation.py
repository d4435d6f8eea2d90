"""Sampling answers, for many prompts and many steering doses in one batch.

All arms of a comparison (doses, directions, models) use the same random numbers for the same prompt: adding Gumbel
noise to the logits and taking the maximum samples exactly from the softmax (the Gumbel-max trick), and the noise
depends only on the seed, the prompt's index and the step. Arms then differ by what was done to the model alone, and a
sample does not depend on which others share its batch.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from helpers import models, steering

MAX_ROWS = 768  # sequences decoded at once
SPANS = ("response", "all")


class GumbelNoise(LogitsProcessor):
    """Add Gumbel noise to the logits, so that the greedy choice is a sample at temperature 1."""

    def __init__(self, prompt_indices: Sequence[int], arms: int, seed: int):
        self.generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in prompt_indices]
        self.arms = arms

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7)))
        return scores.float() + gumbel.repeat_interleave(self.arms, dim=0).to(scores.device)


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
    """Answer every prompt once per arm: [arm][prompt] -> token ids, up to and without the end-of-sequence token.

    seed: of the samples; None decodes greedily.
    deltas: (arms, d), what each arm adds at `site` (a dose times a direction); None is one arm without a hook.
    span: "response" steers every position that predicts a token of the response, so from the prompt's last token on;
    "all" steers the prompt too. Raises ValueError for an empty prompt or one that leaves no room for the answer.
    """
    models.check_lengths(model, [len(p) + new_tokens if p else 0 for p in prompts])
    if span not in SPANS:
        raise ValueError(f"Unknown span {span!r}: choose from {', '.join(SPANS)}.")
    arms = 1 if deltas is None else len(deltas)
    answers = [[[]] * len(prompts) for _ in range(arms)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    step = max(1, MAX_ROWS // arms)
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False)
    for chunk in (order[i : i + step] for i in range(0, len(order), step)):
        decoded = _decode(model, tokenizer, prompts, chunk, arms, new_tokens, seed, site, deltas, span)
        for row, ids in enumerate(decoded):
            answers[row % arms][chunk[row // arms]] = ids
        bar.update(len(chunk))
    bar.close()
    return answers


@torch.no_grad()
def _decode(model, tokenizer, prompts, chunk, arms, new_tokens, seed, site, deltas, span) -> list[list[int]]:
    inputs, attended = _left_padded([prompts[i] for i in chunk], tokenizer.pad_token_id, model.device)
    width = inputs.shape[1]
    noise = [] if seed is None else [GumbelNoise(chunk, arms, seed)]
    hook = nullcontext()
    if deltas is not None:
        start = width - 1 if span == "response" else 0
        hook = steering.added(model, site, deltas.repeat(len(chunk), 1), start)
    with hook:
        out = models.causal_lm(model).generate(
            input_ids=inputs.repeat_interleave(arms, dim=0),
            attention_mask=attended.repeat_interleave(arms, dim=0),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            logits_processor=LogitsProcessorList(noise),
        )
    return [_until_end(ids, tokenizer.eos_token_id) for ids in out[:, width:].tolist()]


def _left_padded(ids: Sequence[list[int]], pad: int, device) -> tuple[Tensor, Tensor]:
    width = max(map(len, ids))
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return inputs, attended


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def texts(tokenizer: PreTrainedTokenizerBase, answers: Sequence[list[int]]) -> list[str]:
    """The answers as text, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
