"""What is measured of a model's answers, and how sure we are: log-probabilities, KL, text overlap, intervals."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from torch import Tensor, nn

from helpers import activations, models
from helpers.activations import Tokens

RESAMPLES = 2000


Around = Callable[[list[Tokens]], AbstractContextManager]  # what to do around the forward pass of a batch


def _nothing(batch: list[Tokens]) -> AbstractContextManager:
    return nullcontext()


@torch.no_grad()
def response_logits(model: nn.Module, sequences: Sequence[Tokens], around: Around = _nothing):
    """Yield (index, log-softmax (T, vocabulary), targets (T,)) for every sequence's response of T tokens."""
    models.check_lengths(model, [len(s.ids) if s.prompt else 0 for s in sequences])
    for indices in activations.batches([len(s.ids) for s in sequences]):
        batch = [sequences[i] for i in indices]
        inputs, attended = activations.right_padded([s.ids for s in batch], model.device)
        with around(batch):
            logits = models.causal_lm(model)(input_ids=inputs, attention_mask=attended, use_cache=False).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        for row, (i, sequence) in enumerate(zip(indices, batch)):
            start, stop = len(sequence.prompt), len(sequence.ids)
            yield i, logits[row, start - 1 : stop - 1].to(wide).log_softmax(-1).cpu(), inputs[row, start:stop].cpu()


def response_logps(model: nn.Module, sequences: Sequence[Tokens], around: Around = _nothing) -> np.ndarray:
    """Sum over the response's tokens of log pi(y_t | x, y_<t), in nats: (N,)."""
    logps = np.empty(len(sequences))
    for i, distribution, targets in response_logits(model, sequences, around):
        logps[i] = distribution.gather(1, targets[:, None]).sum().item()
    return logps


def response_distributions(model: nn.Module, sequences: Sequence[Tokens], around: Around = _nothing) -> list[Tensor]:
    """The next-token log-probabilities at every response token: one (T, vocabulary) tensor a sequence."""
    found = {i: distribution for i, distribution, _ in response_logits(model, sequences, around)}
    return [found[i] for i in range(len(sequences))]


def kl(p: Sequence[Tensor], q: Sequence[Tensor]) -> np.ndarray:
    """KL(p || q) summed over the response's tokens, in nats: (N,), from `response_distributions` of both."""
    return np.array([_kl(a, b) for a, b in zip(p, q)])


def _kl(a: Tensor, b: Tensor) -> float:
    # normalised again in float64: rounding in float32 makes the KL of two near distributions negative
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return torch.where(a > -torch.inf, a.exp() * (a - b), 0.0).sum().item()


def token_losses(model: nn.Module, sequences: Sequence[Tokens]) -> np.ndarray:
    """Mean negative log-probability a token of each response under `model`, in nats; nan for an empty response."""
    lengths = np.array([len(s.response) for s in sequences])
    losses = np.full(len(sequences), np.nan)
    filled = np.flatnonzero(lengths)
    losses[filled] = -response_logps(model, [sequences[i] for i in filled]) / lengths[filled]
    return losses


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU (sacrebleu, with its smoothing and effective order), scaled to 0..1."""
    return sacrebleu.sentence_bleu(answer, [reference]).score / 100


_ROUGE = RougeScorer(["rougeL"])


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F measure (rouge-score), 0..1."""
    return _ROUGE.score(reference, answer)["rougeL"].fmeasure


def interval(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(value, low, high): a statistic of paired samples, each (N,), and its percentile bootstrap interval over pairs.

    `statistic(*samples, axis)` must be vectorised over leading axes. Raises ValueError for fewer than two pairs.
    """
    if len(samples[0]) < 2:
        raise ValueError(f"An interval needs at least two prompts, got {len(samples[0])}.")
    result = stats.bootstrap(
        samples, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=200,
        confidence_level=confidence, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    value, (low, high) = statistic(*samples, axis=-1), result.confidence_interval
    return float(value), float(low), float(high)


def row_interval(
    statistic: Callable[[np.ndarray], float], n: int, seed: int = 0, resamples: int = 300
) -> tuple[float, float, float]:
    """(value, low, high) of a statistic of a matrix's rows, `statistic(row indices)`, by resampling its n rows.

    The interval is widened to hold the value, which resampled rows (fewer different ones) may all fall short of.
    """
    result = stats.bootstrap(
        (np.arange(n),), statistic, vectorized=False, n_resamples=resamples, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    value, (low, high) = statistic(np.arange(n)), result.confidence_interval
    return float(value), float(min(low, value)), float(max(high, value))


def mean(sample: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the values that there are: an empty answer has no loss a token."""
    return np.nanmean(sample, axis=axis)


def recovered_share(steered: np.ndarray, start: np.ndarray, goal: np.ndarray, axis: int = -1) -> np.ndarray:
    """(mean(steered) - mean(start)) / (mean(goal) - mean(start)): 0 nothing, 1 all of the way; nan for no way to go.

    With start = base and goal = DPO it is the recovered share of base + lambda v*; the other way round, the restored
    share of dpo - lambda v*.
    """
    way = goal.mean(axis) - start.mean(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(way == 0, np.nan, (steered.mean(axis) - start.mean(axis)) / way)


def removed_share(remaining: np.ndarray, total: np.ndarray, axis: int = -1) -> np.ndarray:
    """1 - mean(remaining) / mean(total): the share of KL(dpo || base) that a change to the base removes."""
    return 1 - remaining.mean(axis) / total.mean(axis)
