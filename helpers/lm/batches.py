"""Sequences of tokens in padded batches that fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

MAX_BATCH_TOKENS = 4096  # padded tokens of one forward pass
Made = TypeVar("Made")


class Tokens(NamedTuple):
    """The token ids of a prompt and of a response to it (empty where only the prompt is read)."""

    prompt: list[int]
    response: list[int] = []  # noqa: RUF012 (a NamedTuple's default; nothing writes to it)

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.response


def shrinking(lengths: Sequence[int], max_tokens: int, compute: Callable[[list[int]], Made]) -> Iterator[Made]:
    """Yield what `compute` makes of each batch of indices (`batches`), in halves from where memory does not suffice.

    What has been yielded is not computed again.
    """
    left = list(range(len(lengths)))
    while left:
        batch = [left[i] for i in next(batches([lengths[i] for i in left], max_tokens))]
        try:
            made = compute(batch)
        except Exception as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
            clear_device_cache(garbage_collection=True)
            max_tokens = max(lengths[i] for i in batch) * len(batch) // 2
            continue
        done = set(batch)
        left = [i for i in left if i not in done]
        yield made


def batches(lengths: Sequence[int], max_tokens: int = MAX_BATCH_TOKENS) -> Iterator[list[int]]:
    """Group indices of similar length so that a padded batch holds at most `max_tokens` (or one sequence)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def right_padded(ids: Sequence[list[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pad token ids on the right: (inputs, attention mask), both (batch, tokens). Padding is masked, so its id is 0."""
    width = max(map(len, ids))
    inputs = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
    attended = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    return inputs, attended
