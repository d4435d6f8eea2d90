"""What a model makes of given answers: log-probabilities, distributions, KL."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from helpers.lm import activations, architecture, batches, steering
from helpers.lm.batches import Tokens

MAX_LOGITS = 2**26  # logits in memory at once


@torch.no_grad()
def response_logits(
    model: nn.Module, sequences: Sequence[Tokens], deltas: Tensor | None = None, progress: str | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index, log-softmax (arms, T, vocabulary), targets (T,)) for every sequence's response of T tokens.

    deltas: what each arm adds at `final`, where it is a bias on the logits (section 2.2), (arms, d), or its own for
    every sequence and token (`steering.by_prompt`). All arms share the forward pass up to there; None is one arm
    without a change. progress: the name of a progress bar.
    """
    architecture.check_sequences(model, [s.ids if s.prompt else [] for s in sequences])
    arms = 1 if deltas is None else len(deltas)
    if deltas is not None:
        deltas = steering.by_prompt(deltas, len(sequences))
    vocabulary = architecture.vocabulary(model)
    most = min(batches.MAX_BATCH_TOKENS, MAX_LOGITS // (arms * vocabulary))

    def compute(indices: list[int]) -> list[tuple[int, Tensor]]:
        batch = [sequences[i] for i in indices]
        inputs, attended = batches.right_padded([s.ids for s in batch], model.device)
        with activations.hooked(
            model, architecture.FINAL, responses_alone(batch, None if deltas is None else deltas[:, indices])
        ):
            logits = architecture.causal_lm(model)(input_ids=inputs, attention_mask=attended, use_cache=False).logits
        answers = logits.split([len(s.response) for s in batch], dim=1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return [(i, answer.to(wide).log_softmax(-1).cpu()) for i, answer in zip(indices, answers)]

    with tqdm(total=len(sequences), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in batches.shrinking([len(s.ids) for s in sequences], most, compute):
            for i, distributions in batch:
                yield i, distributions, torch.tensor(sequences[i].response, dtype=torch.long)
            bar.update(len(batch))


def responses_alone(batch: Sequence[Tokens], deltas: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Turn the final states of a batch into those that predict its responses, end to end, for each arm: the unembedding
    then reads (arms, all response tokens, d). deltas: (arms, batch, tokens, d) or None."""
    where = [(row, len(s.prompt) - 1 + t, t) for row, s in enumerate(batch) for t in range(len(s.response))]
    rows, positions, tokens = torch.tensor(where, dtype=torch.long).view(-1, 3).unbind(1)

    def change(states: Tensor) -> Tensor:
        read = states[rows.to(states.device), positions.to(states.device)]
        if deltas is None:
            return read[None]
        return read[None] + deltas[:, rows, tokens.clamp(max=deltas.shape[2] - 1)].to(read)

    return change


def response_logps(
    model: nn.Module, sequences: Sequence[Tokens], deltas: Tensor | None = None, progress: str | None = None
) -> np.ndarray:
    """Sum over the response's tokens of log pi(y_t | x, y_<t), in nats: (N,), or (arms, N) with `deltas`."""
    logps = np.empty((1 if deltas is None else len(deltas), len(sequences)))
    for i, distributions, targets in response_logits(model, sequences, deltas, progress):
        logps[:, i] = distributions[:, torch.arange(len(targets)), targets].sum(dim=1).numpy()
    return logps[0] if deltas is None else logps


def response_distributions(model: nn.Module, sequences: Sequence[Tokens], progress: str | None = None) -> list[Tensor]:
    """The next-token log-probabilities at every response token: one (T, vocabulary) tensor a sequence."""
    found = {i: distributions[0] for i, distributions, _ in response_logits(model, sequences, None, progress)}
    return [found[i] for i in range(len(sequences))]


@torch.no_grad()
def response_states(model: nn.Module, sequences: Sequence[Tokens], progress: str | None = None) -> list[Tensor]:
    """The states at `final` of a prompt's last token and of the response's: one (1 + T, d) float32 tensor a sequence,
    whose first T rows predict the response's tokens."""
    architecture.check_sequences(model, [s.ids if s.prompt else [] for s in sequences])

    def compute(indices: list[int]) -> list[tuple[int, Tensor]]:
        batch = [sequences[i] for i in indices]
        inputs, attended = batches.right_padded([s.ids for s in batch], model.device)
        states = architecture.decoder(model)(input_ids=inputs, attention_mask=attended, use_cache=False)[0].float()
        read = [row[len(s.prompt) - 1 : len(s.ids)].cpu() for row, s in zip(states, batch)]
        return list(zip(indices, read))

    found = {}
    with tqdm(total=len(sequences), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in batches.shrinking([len(s.ids) for s in sequences], batches.MAX_BATCH_TOKENS, compute):
            found |= batch
            bar.update(len(batch))
    return [found[i] for i in range(len(sequences))]


def in_memory(sequences: Sequence[Tokens], vocabulary: int) -> Iterator[slice]:
    """As many answers at a time as their next-token distributions may be kept in memory."""
    longest = max(len(tokens.response) for tokens in sequences)
    n = max(1, MAX_LOGITS // (vocabulary * max(longest, 1)))
    return (slice(i, i + n) for i in range(0, len(sequences), n))


def kl_to(
    goal: Sequence[Tensor],
    model: nn.Module,
    sequences: Sequence[Tokens],
    deltas: Tensor | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """KL(goal || model) summed over each response's tokens, in nats: (N,), or (arms, N) with `deltas`.

    goal: the goal's `response_distributions` of the same sequences.
    """
    found = np.empty((1 if deltas is None else len(deltas), len(sequences)))
    for i, distributions, _ in response_logits(model, sequences, deltas, progress):
        found[:, i] = kl(goal[i], distributions).numpy()
    return found[0] if deltas is None else found


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) summed over tokens, in nats: (...,) from log-probabilities (..., T, vocabulary)."""
    # normalised again in float64: rounding in float32 makes the KL of two near distributions negative
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(dim=(-2, -1))


def token_losses(
    model: nn.Module, sequences: Sequence[Tokens], progress: str | None = None, score: Callable = response_logps
) -> np.ndarray:
    """Mean negative log-probability a token of each response under `model`, in nats; nan for an empty response.
    score: gives the log-probabilities, as `response_logps` does."""
    lengths = np.array([len(s.response) for s in sequences])
    losses = np.full(len(sequences), np.nan)
    filled = np.flatnonzero(lengths)
    losses[filled] = -score(model, [sequences[i] for i in filled], None, progress) / lengths[filled]
    return losses
