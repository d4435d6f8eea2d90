"""Constant vectors in the blocks: one added at every position of a site, or of several, like biases of the blocks.

They are trained as nothing else here is, by gradients through the model, to bring it nearest in KL to a partner: a
vector in a block that does little was then not merely estimated badly.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from tqdm import tqdm

from helpers.lm import activations, architecture, batches, likelihoods
from helpers.lm.batches import Tokens

STEPS, ROUNDS = 15, 3
MAX_BATCH_TOKENS = 1024  # of a large model, whose states in all blocks are kept for gradients


@contextmanager
def added(model: nn.Module, vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, each site's vector, (d,), is added to its states at every position, the prompt's too."""
    with ExitStack() as stack:
        for site, v in vectors.items():
            stack.enter_context(activations.hooked(model, site, lambda states, v=v: states + v.to(states)))
        yield


class Towards(NamedTuple):
    """A goal to come near to: its own answers, and its next-token log-probabilities at their tokens, (T, vocabulary)
    each."""

    answered: Sequence[Tokens]
    distributions: Sequence[Tensor]


def nearest_vectors(
    model: nn.Module, towards: Towards, others: Towards, scales: Mapping[str, float], rounds: int = ROUNDS,
    progress: str | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """{site: v, (d,)} for the sites of `scales`, jointly: those that bring the model nearest to a goal in KL, mean over
    all tokens of its answers.

    By L-BFGS from zero, in rounds of STEPS, for as long as the goal's `others` come nearer too. scales: the root mean
    square of each site's states, in which vectors are sought.
    """
    sites = list(scales)
    widths = [architecture.width(model, site) for site in sites]

    def vectors(flat: np.ndarray) -> dict[str, Tensor]:
        parts = torch.from_numpy(flat).float().split(widths)
        return {site: scales[site] * part for site, part in zip(sites, parts)}

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradients = kl_and_gradients(model, towards, vectors(flat))
        bar.update()
        return value, torch.cat([scales[site] * part for site, part in zip(sites, gradients)]).double().numpy()

    best = np.zeros(sum(widths))
    left = _kl_to(model, others, vectors(best))
    with tqdm(desc=progress, disable=progress is None, leave=False) as bar:
        for _ in range(rounds):
            found = minimize(objective, best, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x
            now = _kl_to(model, others, vectors(found))
            if now >= left:
                break
            best, left = found, now
    return vectors(best)


def _kl_to(model: nn.Module, goal: Towards, vectors: Mapping[str, Tensor]) -> float:
    with added(model, vectors):
        return likelihoods.kl_to(goal.distributions, model, goal.answered).mean()


def kl_and_gradients(model: nn.Module, towards: Towards, vectors: Mapping[str, Tensor]) -> tuple[float, list[Tensor]]:
    """The mean KL a token of a goal || model + vectors, nats, and its gradient at each vector."""
    sequences, tokens = towards.answered, sum(len(s.response) for s in towards.answered)
    vectors = {site: v.detach().requires_grad_() for site, v in vectors.items()}

    def compute(indices: list[int]) -> tuple[float, tuple[Tensor, ...]]:
        with torch.enable_grad():
            goal = torch.cat([towards.distributions[i] for i in indices])
            kl = _kl(model, goal, [sequences[i] for i in indices]) / tokens
            return kl.item(), torch.autograd.grad(kl, list(vectors.values()))

    most = batches.MAX_BATCH_TOKENS if architecture.is_small(model) else MAX_BATCH_TOKENS
    with added(model, vectors):
        found = list(batches.shrinking([len(s.ids) for s in sequences], most, compute))
    return sum(value for value, _ in found), [sum(of_batch) for of_batch in zip(*(grads for _, grads in found))]


def _kl(model: nn.Module, goal: Tensor, batch: Sequence[Tokens]) -> Tensor:
    inputs, attended = batches.right_padded([s.ids for s in batch], model.device)
    with activations.hooked(model, architecture.FINAL, likelihoods.responses_alone(batch, None)):
        logits = architecture.causal_lm(model)(input_ids=inputs, attention_mask=attended, use_cache=False).logits[0]
    goal = goal.to(logits.device)
    return torch.where(goal > -torch.inf, goal.exp() * (goal - logits.float().log_softmax(-1)), 0.0).sum()
