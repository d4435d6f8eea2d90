"""What is measured of a model's answers, and how sure we are: log-probabilities, KL, text overlap, intervals."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from torch import Tensor, nn

from helpers import activations, models
from helpers.activations import Tokens

RESAMPLES = 2000
MAX_LOGITS = 2**26  # logits in memory at once


@torch.no_grad()
def response_logits(
    model: nn.Module, sequences: Sequence[Tokens], deltas: Tensor | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index, log-softmax (arms, T, vocabulary), targets (T,)) for every sequence's response of T tokens.

    deltas: (arms, d), what each arm adds at `final`, where it is a constant bias on the logits (section 2.2). All arms
    share the forward pass up to there; None is one arm without a change.
    """
    models.check_lengths(model, [len(s.ids) if s.prompt else 0 for s in sequences])
    arms = 1 if deltas is None else len(deltas)
    vocabulary = models.unembedding(model).out_features
    most = min(activations.MAX_BATCH_TOKENS, MAX_LOGITS // (arms * vocabulary))
    for indices in activations.batches([len(s.ids) for s in sequences], most):
        batch = [sequences[i] for i in indices]
        inputs, attended = activations.right_padded([s.ids for s in batch], model.device)
        with activations.hooked(model, models.FINAL, _responses_alone(batch, deltas)):
            logits = models.causal_lm(model)(input_ids=inputs, attention_mask=attended, use_cache=False).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        for i, of_one in zip(indices, logits.split([len(s.response) for s in batch], dim=1)):
            yield i, of_one.to(wide).log_softmax(-1).cpu(), torch.tensor(sequences[i].response, dtype=torch.long)


def _responses_alone(batch: Sequence[Tokens], deltas: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Turn the final states of a batch into those that predict its responses, end to end, for each arm: the unembedding
    then reads (arms, all response tokens, d)."""
    where = [(row, t) for row, s in enumerate(batch) for t in range(len(s.prompt) - 1, len(s.ids) - 1)]
    rows, positions = torch.tensor(where, dtype=torch.long).view(-1, 2).unbind(1)

    def change(states: Tensor) -> Tensor:
        read = states[rows.to(states.device), positions.to(states.device)]
        return read[None] if deltas is None else read[None] + deltas.to(read)[:, None]

    return change


def response_logps(model: nn.Module, sequences: Sequence[Tokens], deltas: Tensor | None = None) -> np.ndarray:
    """Sum over the response's tokens of log pi(y_t | x, y_<t), in nats: (N,), or (arms, N) with `deltas`."""
    logps = np.empty((1 if deltas is None else len(deltas), len(sequences)))
    for i, distributions, targets in response_logits(model, sequences, deltas):
        logps[:, i] = distributions[:, torch.arange(len(targets)), targets].sum(dim=1).numpy()
    return logps[0] if deltas is None else logps


def response_distributions(model: nn.Module, sequences: Sequence[Tokens]) -> list[Tensor]:
    """The next-token log-probabilities at every response token: one (T, vocabulary) tensor a sequence."""
    found = {i: distributions[0] for i, distributions, _ in response_logits(model, sequences)}
    return [found[i] for i in range(len(sequences))]


def kl_to(
    goal: Sequence[Tensor], model: nn.Module, sequences: Sequence[Tokens], deltas: Tensor | None = None
) -> np.ndarray:
    """KL(goal || model) summed over each response's tokens, in nats: (N,), or (arms, N) with `deltas`.

    goal: the goal's `response_distributions` of the same sequences.
    """
    found = np.empty((1 if deltas is None else len(deltas), len(sequences)))
    for i, distributions, _ in response_logits(model, sequences, deltas):
        found[:, i] = kl(goal[i], distributions).numpy()
    return found[0] if deltas is None else found


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) summed over tokens, in nats: (...,) from log-probabilities (..., T, vocabulary)."""
    # normalised again in float64: rounding in float32 makes the KL of two near distributions negative
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(dim=(-2, -1))


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


def share_interval(sample: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """(value, low, high): the share of ones in a sample of zeros and ones, (N,), with Wilson's interval.

    Unlike a bootstrap it has a width where every value is the same.
    """
    found = stats.binomtest(int(sample.sum()), len(sample)).proportion_ci(confidence, method="wilson")
    return float(sample.mean()), float(found.low), float(found.high)


def jackknife_interval(statistic: Callable[[np.ndarray], float], n: int) -> tuple[float, float, float]:
    """(value, low, high): a smooth statistic of a matrix's n rows, `statistic(row indices)`, and its 95 % jackknife
    interval (Efron and Stein 1981).

    Not a bootstrap: resampled rows hold duplicates, which by themselves raise the top singular value.
    """
    rows = np.arange(n)
    value = statistic(rows)
    without = np.array([statistic(np.delete(rows, i)) for i in rows])
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return float(value), float(value - 1.96 * error), float(value + 1.96 * error)


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
