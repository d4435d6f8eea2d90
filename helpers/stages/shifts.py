"""The nearest shifts at `final` that depend on the context linearly (lm/linear_shifts.py), and what they may depend
on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from helpers.lm import architecture, likelihoods, linear_shifts, steering
from helpers.lm.batches import Tokens
from helpers.lm.linear_shifts import LinearShift
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role

CONTEXTS = 2048  # tokens of answers that shifts are found on, and as many that choose the penalty, at most
MOST_LOGITS = 2**25  # of those contexts together: a search computes them some thousand times
# Of these the one that serves validation contexts best; under the first one a shift is one constant vector.
PENALTIES = (math.inf, 10.0, 1.0, 1e-1, 1e-3, 1e-4, 1e-5, 1e-6)
FEWEST = 1 / 64  # of all contexts, that a token of the answer needs for a vector of its own
TOKEN, PROBE, PROMPT, STATE = KINDS = ("token", "probe", "prompt", "state")  # what x(c) may be
LOW_RANKS = (1, 2, 4)  # of a change of the head, beside the full one


class Contexts(NamedTuple):
    """Where tokens of answers are predicted, a row each: the base's state there and at the prompt's last token, (N, d)
    each, the goal's expected embedding E(c), (N, d), which token comes next, (N,), and the side of its prompt, (N,)."""

    states: Tensor
    prompts: Tensor
    expected: Tensor
    tokens: Tensor
    sides: Tensor

    def features(self, kind: str, tokens: int) -> Tensor:
        """x(c), (N, p)."""
        if kind == TOKEN:
            return one_hot(self.tokens, tokens).to(self.states)
        return {PROBE: self.sides[:, None], PROMPT: self.prompts, STATE: self.states}[kind]


def one_hot(tokens: Tensor, n: int) -> Tensor:
    """Which of n tokens of an answer comes next, (N, n): those beyond count as the last."""
    return torch.nn.functional.one_hot(tokens.clamp(max=n - 1), n)


@stage
def shifts(
    role: Role, goal: Role, heldin: Sequence[Tokens], validation: Sequence[Tokens], sides: tuple[Tensor, Tensor],
    seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    """The nearest shift of each kind from `role` to `goal`: {"kind rank part": tensor}, `of_kind` reads them.

    heldin, validation: the goal's own answers, on whose tokens shifts are found and the penalty on their squares is
    chosen. sides: what the probe says of each of their prompts, 1 or -1, (answers,). Raises NoBias where logits are
    more than W h.
    """
    head = _head(role)
    fit, check = (_contexts(role, goal, head.W, *given, seed) for given in zip((heldin, validation), sides))
    tokens, found = _of_their_own(fit.tokens), {}
    kinds = tqdm(KINDS, desc=f"shifts at final towards {goal.name}, by what they depend on", leave=False, delay=2)
    with role.opened():  # its products are as large as the model's
        for kind in kinds:
            found |= _of_a_kind(head, fit, check, kind, tokens)
    return found


def _of_their_own(tokens: Tensor) -> int:
    """How many tokens of an answer, from the first one on, are met often enough for a vector of their own, at least
    one. tokens: which one each context predicts, (N,)."""
    often = torch.bincount(tokens) >= FEWEST * len(tokens)
    return max(1, int(often.long().cumprod(0).sum()))


def of_kind(found: dict[str, Tensor], kind: str, rank: int = 0) -> LinearShift:
    """One of the shifts that `shifts` found; rank 0 is the full one."""
    b, M, mean, scale = (found[f"{kind} {rank} {name}"] for name in ("b", "M", "mean", "scale"))
    return LinearShift(b, M, mean, scale.item())


def _parts(shift: LinearShift) -> list[tuple[str, Tensor]]:
    parts = (shift.b, shift.M, shift.mean, torch.tensor(shift.scale, dtype=torch.float64))
    return list(zip(("b", "M", "mean", "scale"), (part.contiguous() for part in parts)))


class _Head(NamedTuple):
    """What makes logits of states: W, (vocabulary, d), and its bias, (vocabulary,), where it has one."""

    W: Tensor
    bias: Tensor | None

    def loss(self, contexts: Contexts) -> linear_shifts.Loss:
        return linear_shifts.kl_loss(self.W, contexts.states, contexts.expected, self.bias)


def _of_a_kind(head: _Head, fit: Contexts, check: Contexts, kind: str, tokens: int) -> dict[str, Tensor]:
    """The parts of the nearest shift of a kind, and its penalty; for a change of the head those of LOW_RANKS too."""
    full, penalty = _best(head, fit, check, kind, tokens)
    low = {k: _of_rank(head, fit, (full, penalty), k) for k in (LOW_RANKS if kind == STATE else ())}
    parts = {f"{kind} {k} {name}": part for k, shift in {0: full, **low}.items() for name, part in _parts(shift)}
    return parts | {f"{kind} penalty": torch.tensor(penalty, dtype=torch.float64)}


def _best(head: _Head, fit: Contexts, check: Contexts, kind: str, tokens: int) -> tuple[LinearShift, float]:
    """The nearest shift of a kind, its penalty the one of PENALTIES under which it serves other contexts best."""
    loss, other = map(head.loss, (fit, check))
    x, tried, start = fit.features(kind, tokens), [], None
    for penalty in tqdm(PENALTIES, desc=f"shifts that depend on the {kind}, penalties", leave=False, delay=2):
        start = linear_shifts.nearest(loss, x, head.W.shape[1], penalty, start=start)
        tried.append((other(start(check.features(kind, tokens)))[0], penalty, start))
    _, penalty, shift = min(tried, key=lambda one: one[0])
    return shift, penalty


def _of_rank(head: _Head, fit: Contexts, full: tuple[LinearShift, float], rank: int) -> LinearShift:
    return linear_shifts.nearest(head.loss(fit), fit.states, head.W.shape[1], full[1], rank, full[0])


def _contexts(role: Role, goal: Role, W: Tensor, answered: Sequence[Tokens], sides: Tensor, seed: int) -> Contexts:
    """CONTEXTS of a goal's answers, drawn at random, or as many as there are, or as MOST_LOGITS allow."""
    n = min(CONTEXTS, MOST_LOGITS // len(W))
    states, expected = _states(role, answered), _expected(goal, answered, W)
    tokens = torch.cat([torch.arange(len(h)) for h in states])
    answer = torch.repeat_interleave(torch.arange(len(states)), torch.tensor([len(h) for h in states]))
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    first = torch.stack([h[0] for h in states])
    own = torch.cat(states)[drawn]
    return Contexts(own, first[answer[drawn]], expected[drawn], tokens[drawn], sides[answer[drawn]].to(own))


def _expected(goal: Role, answered: Sequence[Tokens], W: Tensor) -> Tensor:
    """E(c) at every token of the answers, (N, d)."""
    with goal.opened() as model:
        read = likelihoods.response_logits(model, answered, None, f"distributions, {goal.name}")
        found = {i: logps[0].float().exp() @ W for i, logps, _ in read}
    return torch.cat([found[i] for i in range(len(answered))])


def _states(role: Role, answered: Sequence[Tokens]) -> list[Tensor]:
    """The states at `final` that predict each token of an answer, (T, d) each."""
    with role.opened() as model:
        found = likelihoods.response_states(model, answered, f"states of answers, {role.name}")
    return [h[:-1] for h in found]


def _head(role: Role) -> _Head:
    with role.opened() as model:
        layer = architecture.unembedding(model)
        W, bias = (part if part is None else part.detach().float().cpu() for part in (layer.weight, layer.bias))
        steering.check_products(model, W)
    return _Head(W, bias)
