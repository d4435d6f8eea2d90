"""Hidden states at chosen sites and positions for many prompts, in one pass.

Only what is asked for is kept: each site is read by a hook that reduces a batch to one vector per sequence and
position, and these go to files batch by batch, so that memory grows neither with tokens nor with prompts x sites x
width. The unembedding is skipped.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from helpers.lm import architecture
from helpers.lm.batches import MAX_BATCH_TOKENS, Tokens, right_padded, shrinking

POSITIONS = ("prompt_last", "response_mean")


@torch.no_grad()
def hidden_states(
    model: nn.Module,
    sequences: Sequence[Tokens],
    sites: Sequence[str],
    positions: Sequence[str] = ("prompt_last",),
    progress: str | None = None,
    folder: Path | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Read hidden states: {(site, position): (N, d) float32 on the CPU}, rows in the order of `sequences`.

    `prompt_last` is the prompt's last token (the paper's choice), `response_mean` the mean over the response's tokens.
    `progress` names a progress bar. folder: where the states are written as they are read, a file a site and position
    (`stored` reads it), and are not held in memory. Where memory does not suffice, batches are halved. Raises
    ValueError for an unknown site or position, a sequence that is empty, too long or lacks the response asked for, and
    for non-finite states.
    """
    _check(model, sequences, positions)
    read: dict[tuple[str, str], Tensor] = {}

    def keep(key: tuple[str, str], batch: list[int], states: Tensor) -> None:
        if key not in read:
            read[key] = _room(key, (len(sequences), states.shape[1]), folder)
        read[key][batch] = states

    def compute(batch: list[int]) -> list[int]:
        _read(model, [sequences[i] for i in batch], sites, positions, lambda key, states: keep(key, batch, states))
        return batch

    with tqdm(total=len(sequences), desc=progress, disable=progress is None, leave=False) as bar:
        for indices in shrinking([len(s.ids) for s in sequences], MAX_BATCH_TOKENS, compute):
            bar.update(len(indices))
    return {(site, p): _finite((site, p), read[site, p]) for site in sites for p in positions}


def stored(folder: Path) -> dict[tuple[str, str], Path]:
    """The files that `hidden_states` wrote into a folder, by site and position."""
    return {tuple(path.stem.split()): path for path in sorted(folder.glob("*.npy"))}


class Stored(Mapping):
    """States, (N, d), in files (`stored`). One is opened when it is asked for, and only what is used of it is read."""

    def __init__(self, paths: dict[tuple[str, ...], Path]):
        self.paths = paths

    def __getitem__(self, key: tuple[str, ...]) -> Tensor:
        return torch.from_numpy(np.load(self.paths[key], mmap_mode="c"))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def _room(key: tuple[str, str], shape: tuple[int, int], folder: Path | None) -> Tensor:
    """Memory, or a file, for the states of a site and position."""
    if folder is None:
        return torch.empty(shape)
    path = folder / f"{' '.join(key)}.npy"
    opened = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full while mapped memory is written to kills the process
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return torch.from_numpy(opened)


def _read(model: nn.Module, batch: Sequence[Tokens], sites: Sequence[str], positions: Sequence[str], keep) -> None:
    """Call `keep((site, position), states)` with the states (batch, d) of each, in one forward pass."""
    inputs, attended = right_padded([s.ids for s in batch], model.device)
    weights = {p: _weights(p, batch, inputs.shape[1]) for p in positions}

    def reduce(site: str, states: Tensor) -> None:
        for position, weight in weights.items():
            keep((site, position), _reduce(states, weight.to(states.device)))

    with reading(model, list(dict.fromkeys(sites)), reduce):
        architecture.decoder(model)(input_ids=inputs, attention_mask=attended, use_cache=False)


def rounding(states: Tensor, dtype: torch.dtype) -> Tensor:
    """How far rounding to `dtype` alone moves the difference of two states of about this size, (N, d) -> (N,): the root
    mean square norm where each coordinate's two errors are uniform in half a step of its own.

    A displacement that is not well above it may be the arithmetic's; through many rounded layers states move further.
    """
    exponents = torch.frexp(states.double()).exponent - 1
    steps = torch.finfo(dtype).eps * torch.exp2(exponents.double())
    return (2 * steps.square() / 12).sum(dim=1).sqrt()


@contextmanager
def reading(model: nn.Module, sites: Sequence[str], keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `keep(site, states)` with the states (batch, tokens, d) of each site at every forward pass inside."""
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(hooked(model, site, lambda states, site=site: keep(site, states)))
        yield


@contextmanager
def hooked(model: nn.Module, site: str, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Pass the states of a site through `change` at every forward pass inside; returning None leaves them as they are.

    Handles blocks that return a tensor and blocks that return a tuple. The hook is removed even after an exception.
    """
    layer = architecture.site_layer(model, site)
    if layer is None:
        handle = architecture.decoder(model).register_forward_hook(lambda _, __, output: _at_final(output, change))
    elif layer == 0:
        handle = architecture.blocks(model)[0].register_forward_pre_hook(
            lambda _, args, kwargs: _at_input(args, kwargs, change), with_kwargs=True
        )
    else:
        handle = architecture.blocks(model)[layer - 1].register_forward_hook(
            lambda _, __, output: _at_output(output, change)
        )
    try:
        yield
    finally:
        handle.remove()


def _at_final(output, change):
    changed = change(output[0])
    if changed is not None:
        output.last_hidden_state = changed
    return output


def _at_input(args, kwargs, change):
    if args:
        changed = change(args[0])
        return None if changed is None else ((changed, *args[1:]), kwargs)
    changed = change(kwargs["hidden_states"])
    return None if changed is None else (args, {**kwargs, "hidden_states": changed})


def _at_output(output, change):
    if isinstance(output, Tensor):
        return change(output)
    changed = change(output[0])
    return None if changed is None else (changed, *output[1:])


def _weights(position: str, batch: Sequence[Tokens], width: int) -> Tensor:
    """Which token of each sequence a position reads: an index (batch,), or averaging weights (batch, tokens)."""
    if position == "prompt_last":
        return torch.tensor([len(s.prompt) - 1 for s in batch])
    spans = [(len(s.prompt), len(s.ids)) for s in batch]
    rows = [[1 / (b - a) if a <= t < b else 0.0 for t in range(width)] for a, b in spans]
    return torch.tensor(rows)


def _reduce(states: Tensor, weight: Tensor) -> Tensor:
    """(batch, tokens, d) -> (batch, d) in float32, by index or by averaging weights."""
    if weight.ndim == 1:
        return states[torch.arange(len(states), device=states.device), weight].float().cpu()
    return torch.einsum("btd,bt->bd", states.float(), weight).cpu()


def _check(model: nn.Module, sequences: Sequence[Tokens], positions: Sequence[str]) -> None:
    unknown = [p for p in positions if p not in POSITIONS]
    if unknown:
        raise ValueError(f"Unknown position {unknown[0]!r}: choose from {', '.join(POSITIONS)}.")
    if not sequences:
        raise ValueError("No prompts to read states at: give at least one.")
    architecture.check_sequences(model, [s.ids if s.prompt else [] for s in sequences])
    if "response_mean" in positions:
        for i, sequence in enumerate(sequences):
            if not sequence.response:
                raise ValueError(f"Sequence {i} has no response to average over: read it at prompt_last instead.")


def _finite(key: tuple[str, str], states: Tensor) -> Tensor:
    bad = (~states.isfinite().all(dim=1)).nonzero()
    if len(bad):
        site, position = key
        raise ValueError(
            f"The states at {site}, {position} are not finite for {len(bad)} of {len(states)} prompts (first: prompt "
            f"{bad[0].item()}): load the model in float32, or drop those prompts."
        )
    return states
