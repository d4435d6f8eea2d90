"""What is measured of a model's answers, and how sure we are: log-probabilities, KL, text overlap, intervals."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from torch import Tensor, nn

from helpers import activations, models, steering
from helpers.activations import Tokens

RESAMPLES = 2000
MAX_LOGITS = 2**26  # logits in memory at once


@torch.no_grad()
def response_logits(
    model: nn.Module, sequences: Sequence[Tokens], deltas: Tensor | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index, log-softmax (arms, T, vocabulary), targets (T,)) for every sequence's response of T tokens.

    deltas: what each arm adds at `final`, where it is a constant bias on the logits (section 2.2): (arms, d), or
    (arms, sequences, d) where every sequence has its own. All arms share the forward pass up to there; None is one arm
    without a change.
    """
    models.check_lengths(model, [len(s.ids) if s.prompt else 0 for s in sequences])
    arms = 1 if deltas is None else len(deltas)
    if deltas is not None:
        deltas = steering.by_prompt(deltas, len(sequences))
    vocabulary = models.unembedding(model).out_features
    most = min(activations.MAX_BATCH_TOKENS, MAX_LOGITS // (arms * vocabulary))

    def compute(indices: list[int]) -> list[tuple[int, Tensor]]:
        batch = [sequences[i] for i in indices]
        inputs, attended = activations.right_padded([s.ids for s in batch], model.device)
        with activations.hooked(
            model, models.FINAL, _responses_alone(batch, None if deltas is None else deltas[:, indices])
        ):
            logits = models.causal_lm(model)(input_ids=inputs, attention_mask=attended, use_cache=False).logits
        answers = logits.split([len(s.response) for s in batch], dim=1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return [(i, answer.to(wide).log_softmax(-1).cpu()) for i, answer in zip(indices, answers)]

    for batch in activations.shrinking([len(s.ids) for s in sequences], most, compute):
        for i, distributions in batch:
            yield i, distributions, torch.tensor(sequences[i].response, dtype=torch.long)


def _responses_alone(batch: Sequence[Tokens], deltas: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Turn the final states of a batch into those that predict its responses, end to end, for each arm: the unembedding
    then reads (arms, all response tokens, d). deltas: (arms, batch, d) or None."""
    where = [(row, t) for row, s in enumerate(batch) for t in range(len(s.prompt) - 1, len(s.ids) - 1)]
    rows, positions = torch.tensor(where, dtype=torch.long).view(-1, 2).unbind(1)

    def change(states: Tensor) -> Tensor:
        read = states[rows.to(states.device), positions.to(states.device)]
        return read[None] if deltas is None else read[None] + deltas[:, rows].to(read)

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


class Estimate(NamedTuple):
    """A number, its 95 % interval and, where several training seeds were measured, its value for each of them."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()

    def clipped(self, low: float, high: float) -> "Estimate":
        """The same with its interval cut to the values that there are."""
        return self._replace(low=max(self.low, low), high=min(self.high, high))

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, groups: Sequence | None = None, seed: int = 0
) -> Estimate:
    """A statistic of the means of paired samples, with its 95 % percentile bootstrap interval over prompts and, where
    there are several, training seeds (`_over_seeds`).

    samples: (N,) each, or (seeds, N): the statistic is then averaged over training seeds, which share their prompts
    and a sample without seeds.
    statistic: of the samples' means, elementwise. groups: a label for each prompt, (N,); prompts of one label are drawn
    together, since they resemble each other. Values that are not there (nan) are left out of a mean. Raises ValueError
    for fewer than two groups.
    """
    samples = np.broadcast_arrays(*(np.atleast_2d(np.asarray(sample, dtype=float)) for sample in samples))
    n = samples[0].shape[1]
    labels, member = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    if len(labels) < 2:
        raise ValueError(f"An interval needs at least two prompts that differ in wording, got {len(labels)}.")
    belongs = np.eye(len(labels))[member]  # (N, groups)
    sums = [np.where(np.isnan(sample), 0.0, sample) @ belongs for sample in samples]  # (seeds, groups) each
    counts = [~np.isnan(sample) @ belongs for sample in samples]

    def by_seed(*drawn: np.ndarray, axis: int) -> np.ndarray:
        """The statistic for every seed, (seeds, ...), from the sums and counts of the groups drawn."""
        totals = np.stack(drawn).sum(axis=axis).reshape(2, len(samples), len(samples[0]), -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return statistic(*(totals[0] / totals[1]))

    flat = [*np.concatenate(sums), *np.concatenate(counts)]
    found = by_seed(*flat, axis=-1)[:, 0]
    with warnings.catch_warnings():  # where the statistic is not there, nan says so
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            flat, lambda *drawn, axis: by_seed(*drawn, axis=axis).mean(axis=0), paired=True, vectorized=True,
            n_resamples=RESAMPLES, batch=200, method="percentile", rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = drawn.confidence_interval
    return _over_seeds(found, found.mean() - low, high - found.mean())


def _over_seeds(by_seed: np.ndarray, below: float, above: float) -> Estimate:
    """The mean over training seeds. Its interval adds to what the prompts leave open, `below` and `above` the value,
    what the seeds do: the half-width of their t interval, in quadrature."""
    value, n = float(by_seed.mean()), len(by_seed)
    if n == 1:
        return Estimate(value, value - float(below), value + float(above))
    of_seeds = stats.t.ppf(0.975, n - 1) * by_seed.std(ddof=1) / np.sqrt(n)
    low, high = value - np.hypot(below, of_seeds), value + np.hypot(above, of_seeds)
    return Estimate(value, float(low), float(high), tuple(by_seed.tolist()))


def share_interval(sample: np.ndarray) -> Estimate:
    """The share of ones in a sample of zeros and ones, (N,) or (seeds, N), with Wilson's 95 % interval for N prompts
    and, where there are several, training seeds (`_over_seeds`).

    Unlike a bootstrap it has a width where every value is the same. It takes prompts for independent. Values that are
    not there (nan) are left out.
    """
    sample = np.atleast_2d(np.asarray(sample, dtype=float))
    by_seed = np.nanmean(sample, axis=1)
    n = int(np.isfinite(sample).sum(axis=1).min())
    found = stats.binomtest(int(by_seed.mean() * n + 1e-9), n).proportion_ci(method="wilson")
    below, above = max(by_seed.mean() - found.low, 0.0), max(found.high - by_seed.mean(), 0.0)
    return _over_seeds(by_seed, below, above).clipped(0, 1)


def jackknife_interval(statistic: Callable[[np.ndarray], Sequence[float]], groups: Sequence) -> Estimate:
    """A smooth statistic of a matrix's rows and its 95 % jackknife interval (Efron and Stein 1981), a group at a time,
    and over training seeds where there are several (`_over_seeds`).

    statistic: of the indices of the rows kept; one value, or one a training seed, which are averaged. groups: a label
    for each row, (N,). Not a bootstrap: resampled rows hold duplicates, which by themselves raise sigma_1.
    """
    member = np.unique(groups, return_inverse=True)[1]
    rows, g = np.arange(len(member)), member.max() + 1
    by_seed = np.atleast_1d(statistic(rows))
    without = np.array([np.mean(statistic(rows[member != i])) for i in range(g)])
    error = np.sqrt((g - 1) / g * np.square(without - without.mean()).sum()) * stats.t.ppf(0.975, g - 1)
    return _over_seeds(by_seed, error, error)


def mean(sample: np.ndarray) -> np.ndarray:
    """The identity: the statistic of one sample that is its mean."""
    return sample


def difference(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """after - before, of two means."""
    return after - before


def recovered_share(steered: np.ndarray, start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """(steered - start) / (goal - start), of means: 0 nothing, 1 all of the way; nan where there is no way to go.

    With start = base and goal = DPO it is the recovered share of base + lambda v*; the other way round, the restored
    share of dpo - lambda v*.
    """
    way = np.asarray(goal - start, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(way == 0, np.nan, (steered - start) / way)


def removed_share(remaining: np.ndarray, total: np.ndarray) -> np.ndarray:
    """1 - remaining / total, of means: the share of KL(dpo || base) that a change to the base removes, or the share of
    squared displacement that a vector explains."""
    return 1 - remaining / total
